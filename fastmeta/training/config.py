"""Options of a training run, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastmeta.core.checks import check_choice, check_count, check_device, check_positive
from fastmeta.engines.base import NORM_STATISTICS
from fastmeta.learners.metric._class_scores import REDUCTIONS
from fastmeta.learners.metric.relation_net import AGGREGATES
from fastmeta.ops._checks import METRICS
from fastmeta.training.learner_options import (
    ALGORITHMS,
    LEARNER_OPTIONS,
    LOSSES,
    METRIC_LEARNERS,
    NAMES,
    OF_SOME_LEARNERS,
    OPTIMIZERS,
    REGRESSION,
    resolved_defaults,
)

# Options that say how far and where a run trains, not what it computes.
CHANGEABLE = {
    "out",
    "iterations",
    "time_limit",
    "checkpoint_every",
    "eval_tasks",
    "device",
    "threads",
}

_BEFORE = {"optimizer": "adam"}  # of runs that are older than the option

_SOURCES = "omniglot:PATH; images:PATH, or images:PATH@SIZE to resize; glyphs; or sinusoid"

_SGD, _ADAM = OPTIMIZERS["sgd"], OPTIMIZERS["adam"]


def _option(group: str, help: str, default: Any = None, **limits: Any) -> Any:
    """Field whose metadata make its ``--help`` and its check: ``choices``, ``least``, ``below``.

    The default None stands for the default of the learner and the data.
    """
    return field(default=default, metadata={"group": group, "help": help, **limits})


_OF_METRIC = f"comparison of embeddings ({', '.join(METRIC_LEARNERS)})"

_GROUPS = ("run", "tasks", "learner", _OF_METRIC, "inner loop (all others)")

_run, _tasks, _learner, _metric, _inner = (partial(_option, group) for group in _GROUPS)


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run, validated and completed.

    An option that is left out, or None, takes the default of the learner and the data.
    ``python -m fastmeta train --help`` lists them all.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or the learner or the data have no such option.

    Example:
        >>> config = TrainConfig("maml", "sinusoid", "runs/sinusoid", steps=5)
        >>> config.shots, config.eval_steps, config.inner_lr
        (10, 5, 0.01)
    """

    # Plain field() calls: type checkers take any other value for a default.
    algorithm: str = field(metadata={"help": "learner", "choices": ALGORITHMS})
    data: str = field(metadata={"group": "tasks", "help": _SOURCES})
    out: str = field(metadata={"help": "folder of the run, made if absent"})
    ways: int = _tasks("classes per task", least=1)
    shots: int = _tasks("support examples per class", least=1)
    queries: int = _tasks("query examples per class", least=1)
    meta_batch: int = _tasks("tasks per iteration", least=1)
    hidden: int = _learner("channels of Conv4, or units per layer of the MLP", least=1)
    pool: str | None = _learner("pooling of Conv4; stride is faster", choices=("max", "stride"))
    train_ways: int | None = _metric("classes per training task", least=2)
    metric: str | None = _metric("distance of embeddings", choices=METRICS)
    scale: float | None = _metric("factor of the distances, an inverse temperature")
    context_steps: int | None = _metric(
        "reads of the support by full context embeddings; 0: no context", least=0
    )
    loss: str | None = _metric(
        "loss: " + "; ".join(f"{' or '.join(own)} for {name}" for name, own in LOSSES.items()),
        choices=tuple(name for own in LOSSES.values() for name in own),
    )
    margin: float | None = _metric(
        "distance from which pairs of two classes have no contrastive loss", least=0
    )
    reduce: str | None = _metric("similarity to a class, of those to its shots", choices=REDUCTIONS)
    aggregate: str | None = _metric("feature maps of a class, of its shots", choices=AGGREGATES)
    norm_statistics: str | None = _metric(
        "what norms use in evaluation; batch is transductive", choices=NORM_STATISTICS
    )
    steps: int | None = _inner("inner steps in training", least=1)
    eval_steps: int | None = _inner("inner steps in evaluation", least=0)
    inner_lr: float | None = _inner("inner step size, or its initial value if it is learned")
    first_order: bool = _inner("leave out second derivatives", False)
    learn_lr: bool = _inner("learn the inner step size", False)
    adapt: Sequence[str] | None = _inner(
        "adapt these parameters, the others are shared and learned: names, or patterns such as "
        "'head.*' (default: adapt all)"
    )
    inner_batch: int | None = _inner("examples per inner step in training", least=1)
    multi_step_iterations: int | None = _inner(
        "iterations until only the loss after the last inner step counts", least=0
    )
    first_order_iterations: int | None = _inner(
        "iterations at the start without second derivatives", least=0
    )
    regularization: float | None = _inner("weight of the distance to the initial parameters")
    cg_steps: int | None = _inner("iterations of conjugate gradients", least=0)
    cg_damping: float | None = _inner("added to the diagonal of the system they solve", least=0)
    precision: str = _learner(
        "dtype of training; bfloat16 is autocast, weights and evaluation stay float32",
        "float32",
        choices=("float32", "bfloat16"),
    )
    optimizer: str | None = _learner("outer optimizer", choices=tuple(OPTIMIZERS))
    lr: float = _learner(f"outer step size (default: {_ADAM} with adam, {_SGD} with sgd)")
    lr_halve_every: int = _learner("iterations until lr halves, again and again", 0, least=0)
    lr_cosine: int | None = _learner(
        "iterations over which lr falls by half a cosine to a hundredth; 0: constant "
        "(default: --iterations for mamlpp, and for reptile with sgd)",
        least=0,
    )
    iterations: int = _run("outer steps", 2000, least=0)
    seed: int = _run("seed of weights, tasks and dropout", 0, least=0, below=2**62)
    device: str = _run("cpu, cuda, cuda:1, ...", "cpu")
    threads: int | None = _run("CPU threads (default: chosen by PyTorch)", least=1)
    protocol: str = _tasks("split of Omniglot", "official", choices=("official", "paper"))
    eval_every: int = _run(
        "iterations between validations; 0: no validation, and all classes train", 0, least=0
    )
    eval_tasks: int = _run("tasks per validation", 100, least=2)
    checkpoint_every: int = _run("iterations between checkpoints", 200, least=1)
    time_limit: float | None = _run("minutes after which to stop with a checkpoint")

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if not isinstance(self.data, str):
            raise TypeError(f"data: expected a string, got {type(self.data).__name__}")
        object.__setattr__(self, "out", str(self.out))
        if self.adapt is not None:
            object.__setattr__(self, "adapt", _patterns(self.adapt))
        self._check_applicable()
        for name, default in resolved_defaults(vars(self)).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for option in dataclasses.fields(self):
            _check_value(option, getattr(self, option.name))
        self._check_together()

    @property
    def regression(self) -> bool:
        """Whether tasks are regression, scored by the mean squared error."""
        return self.data == REGRESSION

    @property
    def title(self) -> str:
        """Learner and data in words, such as ``"ProtoNet on omniglot"``."""
        return f"{NAMES[self.algorithm]} on {self.data.partition(':')[0]}"

    @property
    def score(self) -> str:
        """Score of a task: ``"accuracy"`` or ``"mse"``."""
        return "mse" if self.regression else "accuracy"

    def _check_applicable(self) -> None:
        if self.algorithm in METRIC_LEARNERS and self.regression:
            raise ValueError(
                f"data: sinusoid is regression, which {self.algorithm} cannot do; use maml"
            )
        if self.regression and self.pool is not None:
            raise ValueError("pool: the network for sinusoid has no such option")
        if self.algorithm == "relation" and self.pool is not None:
            raise ValueError("pool: the network for relation has no such option")
        for name in OF_SOME_LEARNERS:
            is_set = getattr(self, name) not in (None, False)
            if is_set and name not in LEARNER_OPTIONS[self.algorithm]:
                raise ValueError(f"{name}: {self.algorithm} has no such option")

    def _check_together(self) -> None:
        """Check the options whose range depends on other options."""
        check_count("ways", self.ways, least=1 if self.regression else 2)
        if self.loss is not None:
            check_choice("loss", self.loss, LOSSES[self.algorithm])
        if self.algorithm == "mamlpp":  # its batch norms know the steps of training, and no more
            check_count("eval_steps", self.eval_steps, least=0, below=(self.steps or 0) + 1)
        if self.lr_cosine and self.lr_halve_every:
            raise ValueError("lr_cosine: lr_halve_every is given too, and they exclude each other")
        check_device(self.device, usable=True)


def _patterns(adapt: Any) -> list[str]:
    """Patterns of names as JSON has them; a text is one of them."""
    found = [adapt] if isinstance(adapt, str) else adapt
    if not isinstance(found, (list, tuple)) or not all(isinstance(p, str) for p in found):
        raise TypeError(f"adapt: expected names or patterns, got {adapt!r}")
    if not found:
        raise ValueError("adapt: expected at least one name or pattern, got []")
    return list(found)


def option_types() -> dict[str, type]:
    """Type of each option of :class:`TrainConfig`, without None."""
    hints = get_type_hints(TrainConfig)
    return {name: (get_args(hint) or (hint,))[0] for name, hint in hints.items()}


_TYPES = option_types()


def _check_value(option: dataclasses.Field[Any], value: object) -> None:
    """Check one option against its type, choices and range."""
    kind, limits = _TYPES[option.name], option.metadata
    if value is None and option.default is None:
        return  # an option of other learners, or one that has no value by default
    if "choices" in limits:
        check_choice(option.name, value, limits["choices"])
    elif kind is int:
        check_count(option.name, value, limits["least"], limits.get("below"))
    elif kind is float and not (value == 0 and "least" in limits):
        check_positive(option.name, value)


def read_options(out: Path) -> dict[str, Any]:
    """Read the options with which the run in ``out`` was started, or last resumed.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its ``config.json`` is damaged.
    """
    path = out / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{out} holds no training run: there is no {path.name}")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fields = dataclasses.fields(TrainConfig)
    # A run that is older than an option reads as if the option had been left out.
    optional = {field.name: None for field in fields if field.default is None} | _BEFORE
    names = {field.name for field in fields}
    if not isinstance(options, dict) or set(options) | set(optional) != names:
        raise ValueError(f"{path} is damaged: it does not hold the options of a run")
    return optional | options


def check_same_run(options: dict[str, Any], begun: dict[str, Any]) -> None:
    """Raise ValueError if ``options`` would make another run of the one that was ``begun``."""
    for name, now in options.items():
        before = begun.get(name, _BEFORE.get(name))
        if before != now and name not in CHANGEABLE:
            raise ValueError(
                f"{name}: the run to resume began with {before!r}, got {now!r}; "
                "leave the option as it was, or train anew in another folder"
            )
