"""Options of the learners of a comparison: common ones, and some of one learner only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmeta.core.checks import check_choice
from fastmeta.training.compare.report import read_record
from fastmeta.training.config import TrainConfig, option_types
from fastmeta.training.learner_options import (
    ALGORITHMS,
    LEARNER_OPTIONS,
    METRIC_LEARNERS,
    OF_SOME_LEARNERS,
    REGRESSION,
)

SAME = ("data", "protocol", "ways", "shots")  # options that the learners share


def plan(
    out: Path,
    data: str | None = None,
    algorithms: Sequence[str] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    resume: bool = False,
    **common: Any,
) -> list[TrainConfig]:
    """Options of several learners on the same data, each in a folder of its own.

    Args:
        out: folder of the comparison; each run is in the subfolder named after its learner.
        data: source of the tasks; needed unless ``resume``.
        algorithms: the learners; ``None``: all that can learn from the data, or the learners
            of the comparison to resume.
        own: options of one learner only, by its name; they override the common ones.
        resume: start from the options of the comparison in ``out``.
        common: options of all learners, as :class:`fastmeta.training.config.TrainConfig` has them.

    Raises:
        FileNotFoundError: there is no comparison to resume.
        ValueError: ``own`` names a learner that is not compared; the comparison to resume has
            other learners; or an error of :class:`fastmeta.training.config.TrainConfig`
            (TypeError too), with the name of the learner.

    Example:
        >>> configs = plan(Path("runs"), "glyphs", ["maml", "fomaml"], {"maml": {"steps": 2}})
        >>> [(config.out, config.steps) for config in configs]
        [('runs/maml', 2), ('runs/fomaml', 5)]
    """
    learners = read_record(out).learners if resume else {}
    begun = {name: learner["options"] for name, learner in learners.items()}
    if algorithms and begun and set(algorithms) != set(begun):
        before, now = ", ".join(begun), ", ".join(algorithms)
        raise ValueError(f"algorithms: the comparison to resume has {before}, got {now}")
    barred = METRIC_LEARNERS if data == REGRESSION else ()
    able = [name for name in ALGORITHMS if name not in barred]
    algorithms = list(begun) or algorithms or able
    own = own or {}
    if unused := [name for name in own if name not in algorithms]:
        raise ValueError(f"set: {unused[0]} is not compared, only {', '.join(algorithms)}")
    if data is not None:
        common["data"] = data
    configs = []
    for name in algorithms:
        with learner_named_in_errors(name):
            options = {**begun.get(name, {}), **common, **own.get(name, {})}
            configs.append(TrainConfig(**options | {"algorithm": name, "out": str(out / name)}))
    return configs


def parse_settings(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by learner, from texts of the form ``"ALGORITHM.OPTION=VALUE"``.

    Raises:
        ValueError: a text has another form, or there is no such algorithm, option or value.

    Example:
        >>> parse_settings(["mamlpp.inner-lr=0.2", "mamlpp.steps=3"])
        {'mamlpp': {'inner_lr': 0.2, 'steps': 3}}
    """
    own: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, _, value = text.partition("=")
        algorithm, _, name = place.partition(".")
        name = name.replace("-", "_")
        if not (algorithm and name and value):
            raise ValueError(f"set: expected ALGORITHM.OPTION=VALUE, got {text!r}")
        check_choice("set", algorithm, ALGORITHMS)
        types = _types_of(algorithm)
        check_choice(f"set {algorithm}", name, types)
        own.setdefault(algorithm, {})[name] = _parsed(types[name], value, text)
    return own


def _types_of(algorithm: str) -> dict[str, type]:
    """Types of the options that one learner of a comparison may have for itself."""
    shared = {"algorithm", "out", *SAME}
    of_others = set(OF_SOME_LEARNERS) - set(LEARNER_OPTIONS[algorithm])
    types = option_types()
    return {name: types[name] for name in types if name not in shared | of_others}


def _parsed(kind: type, value: str, text: str) -> Any:
    if kind == Sequence[str]:
        return value.split(",")
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ValueError(f"set: expected {expected}, got {text!r}") from None


@contextmanager
def learner_named_in_errors(learner: str) -> Iterator[None]:
    """Put the name of the learner before the message of an error inside."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{learner}: {error}") from error
