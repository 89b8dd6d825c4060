"""The options of the learners of a comparison: common ones, and some of one learner only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastmeta.training.compare.report import read_record
from fastmeta.training.config import ALGORITHMS, OPTIONS, TrainConfig

SAME = ("data", "protocol", "ways", "shots")  # what the learners of a comparison share

_NOT_ONE_S = {"algorithm", "out", *SAME}

_WORDS = {"true": True, "false": False}


def plan(
    out: Path,
    data: str,
    algorithms: Sequence[str] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **common: Any,
) -> list[TrainConfig]:
    """The options of several learners on the same data, each in a folder of its own.

    Args:
        out: folder of the comparison; a learner's run is in the folder of its name within.
        data: as for :class:`fastmeta.training.config.TrainConfig`.
        algorithms: the learners; ``None``: all that can learn from the data.
        own: options of one learner only, by its name; they come before the common ones.
        common: options of all learners, as for :class:`fastmeta.training.config.TrainConfig`.

    Raises:
        ValueError: options of a learner that is not there; and with the learner's name, what
            :class:`fastmeta.training.config.TrainConfig` raises, TypeError too.

    Example:
        >>> configs = plan(Path("runs"), "glyphs", ["maml", "fomaml"], {"maml": {"steps": 2}})
        >>> [(config.out, config.steps) for config in configs]
        [('runs/maml', 2), ('runs/fomaml', 5)]
    """
    own = own or {}
    if algorithms is None:
        algorithms = [name for name in ALGORITHMS if _can_learn(name, data)]
    _check_own(own, algorithms)
    return [
        _config(name, data=data, out=str(out / name), **{**common, **own.get(name, {})})
        for name in algorithms
    ]


def resumed_plan(
    out: Path,
    data: str | None = None,
    algorithms: Sequence[str] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    **common: Any,
) -> list[TrainConfig]:
    """The options that the comparison in ``out`` was begun with, and of :func:`plan` those given.

    Raises:
        FileNotFoundError: there is no comparison.
        ValueError: other learners than before, or other options that a run must keep.
    """
    learners = read_record(out)["learners"]
    begun = {record["algorithm"]: record["options"] for record in learners}
    if algorithms is not None and set(algorithms) != set(begun):
        raise ValueError(
            f"algorithms: the comparison to resume has {', '.join(begun)}, "
            f"got {', '.join(algorithms)}"
        )
    own = own or {}
    _check_own(own, begun)
    given = common if data is None else {"data": data, **common}
    return [
        _config(**{**options, **given, **own.get(name, {}), "out": str(out / name)})
        for name, options in begun.items()
    ]


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Algorithm, option and value of ``"ALGORITHM.OPTION=VALUE"``.

    Raises:
        ValueError: it has another form, or there is no such algorithm, option or value.

    Example:
        >>> parse_setting("mamlpp.inner-lr=0.2")
        ('mamlpp', 'inner_lr', 0.2)
    """
    place, _, value = text.partition("=")
    algorithm, _, option = place.partition(".")
    option = option.replace("-", "_")
    if not (algorithm and option and value):
        raise ValueError(f"set: expected ALGORITHM.OPTION=VALUE, got {text!r}")
    if algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"set: expected one of {known} before the point, got {text!r}")
    kinds = _settings(algorithm)
    if option not in kinds:
        raise ValueError(f"set: {algorithm} has {', '.join(kinds)} to set, got {text!r}")
    kind = kinds[option]
    try:
        return algorithm, option, _WORDS[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ValueError(f"set: expected {expected}, got {text!r}") from None


def _settings(algorithm: str) -> dict[str, type]:
    """The options that one learner may have for itself, and their types."""
    of_others = {name for names in OPTIONS.values() for name in names} - {*OPTIONS[algorithm]}
    hints = get_type_hints(TrainConfig)
    hints = {name: (get_args(hint) or (hint,))[0] for name, hint in hints.items()}
    return {name: hints[name] for name in hints if name not in _NOT_ONE_S | of_others}


def _can_learn(algorithm: str, data: str) -> bool:
    try:
        TrainConfig(algorithm, data, out="")
    except ValueError:
        return False
    return True


def _check_own(own: Iterable[str], compared: Iterable[str]) -> None:
    known = tuple(compared)
    if unused := [name for name in own if name not in known]:
        raise ValueError(f"set: {unused[0]} is not compared, only {', '.join(known)}")


def _config(algorithm: str, **options: Any) -> TrainConfig:
    with with_learner_name(algorithm):
        return TrainConfig(algorithm, **options)


@contextmanager
def with_learner_name(learner: str) -> Iterator[None]:
    """Say in errors whose options are wrong."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{learner}: {error}") from error
