"""What a training run is: its options, their usual values, and which a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmeta.core.checks import check_choice, check_count
from fastmeta.ops._checks import METRICS

# Algorithms in words, as titles have them.
NAMES = {
    "protonet": "ProtoNet",
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "reptile": "Reptile",
    "metasgd": "Meta-SGD",
    "mamlpp": "MAML++",
    "metacurvature": "Meta-Curvature",
    "imaml": "iMAML",
}

ALGORITHMS = tuple(NAMES)

PROTOCOLS = ("official", "paper")

POOLS = ("max", "stride")

PRECISIONS = ("float32", "bfloat16")

OPTIMIZERS = {"adam": 1e-3, "sgd": 1.0}  # and their usual step sizes

REGRESSION = "sinusoid"

_UNSET: Any = None

# Options that say how far and where a run goes, not what it computes.
CHANGEABLE = {
    *("out", "iterations", "time_limit", "checkpoint_every", "eval_tasks", "device", "threads"),
}

_BEFORE = {"optimizer": "adam"}  # what all runs had before there was a choice

_INNER_LOOP = ("steps", "eval_steps", "inner_lr")

# What each learner is made with; but for train_ways and eval_steps, by these names.
OPTIONS = {
    "protonet": ("metric", "train_ways"),
    "maml": (*_INNER_LOOP, "first_order", "learn_lr"),
    "fomaml": (*_INNER_LOOP, "learn_lr"),
    "anil": (*_INNER_LOOP, "first_order", "learn_lr"),
    "reptile": (*_INNER_LOOP, "inner_batch"),
    "metasgd": (*_INNER_LOOP, "first_order"),
    "mamlpp": (*_INNER_LOOP, "multi_step_iterations", "first_order_iterations"),
    "metacurvature": (*_INNER_LOOP, "first_order"),
    "imaml": (*_INNER_LOOP, "regularization", "cg_steps", "cg_damping"),
}

_OF_SOME = tuple(dict.fromkeys(name for names in OPTIONS.values() for name in names))

# Usual values that differ from MAML's.
_USUAL: dict[str, dict[str, Any]] = {
    "fomaml": {"steps": 5, "inner_lr": 0.1},
    "anil": {"steps": 5, "inner_lr": 0.1},
    "reptile": {"steps": 5, "eval_steps": 50, "inner_lr": 0.001, "inner_batch": 10},
    "mamlpp": {
        **{"steps": 5, "inner_lr": 0.1},
        **{"multi_step_iterations": 1000, "first_order_iterations": 0},
    },
    "imaml": {
        **{"steps": 16, "inner_lr": 0.1},
        **{"regularization": 2.0, "cg_steps": 5, "cg_damping": 1.0},
    },
}


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run; a config that exists is valid and complete.

    An option left out takes its usual value, where that depends on the data or the algorithm too.

    Args:
        algorithm: ``"protonet"``, ``"maml"``, or one of MAML's relatives: ``"fomaml"``, ``"anil"``,
            ``"reptile"``, ``"metasgd"``, ``"mamlpp"``, ``"metacurvature"``, ``"imaml"``.
        data: ``"omniglot:PATH"``; ``"images:PATH"``, or ``"images:PATH@SIZE"`` to resize them, for
            PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE; ``"glyphs"``; or ``"sinusoid"``
            (regression, not for protonet).
        out: the run's folder; it is made.
        ways: classes a task, in evaluation and, but for ``train_ways``, in training (5).
        shots: support examples a class (1; sinusoid 10).
        queries: query examples a class (15; sinusoid 10).
        meta_batch: tasks an iteration (protonet 4, others 16; sinusoid 25).
        hidden: channels of Conv4's layers (64), or units of the sinusoid network's two (40).
        pool: images: how Conv4 halves them, ``"max"`` pooling or ``"stride"``, 3.7 times less work.
        train_ways: protonet: classes a training task (``ways``); more make better embeddings.
        metric: protonet: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        steps: all but protonet: inner steps in training (1; fomaml, anil, mamlpp and reptile 5;
            imaml 16).
        eval_steps: all but protonet: inner steps in evaluation (``steps``; reptile 50); with mamlpp
            at most ``steps``.
        inner_lr: all but protonet: step size of the inner loop, where it starts if it is learned
            (0.4; fomaml, anil, mamlpp and imaml 0.1; sinusoid 0.01; reptile 0.001, that of Adam).
        first_order: maml, anil, metasgd, metacurvature: leave the second derivatives out.
        learn_lr: maml, fomaml, anil: learn the inner step size, from ``inner_lr`` on.
        inner_batch: reptile: examples of an inner step in training (10).
        multi_step_iterations: mamlpp: until the last step's loss is alone (1000).
        first_order_iterations: mamlpp: of first order at the start (0).
        regularization: imaml: the weight of the distance to the start, lambda (2).
        cg_steps: imaml: iterations of conjugate gradients (5).
        cg_damping: imaml: added to the diagonal that they solve with (1).
        precision: of training: ``"float32"``, or ``"bfloat16"``: autocast, weights and evaluation
            stay float32. Quick where the hardware multiplies bfloat16 matrices.
        optimizer: of the outer loop: ``"adam"`` or ``"sgd"`` (adam; reptile sgd).
        lr: step size of the outer loop (adam 0.001, sgd 1).
        lr_halve_every: iterations after which ``lr`` halves, again and again; 0: constant.
        lr_cosine: iterations over which ``lr`` falls by half a cosine to a hundredth, where it
            stays (mamlpp, and sgd with reptile: ``iterations``); 0 or None: it does not.
        iterations: outer steps.
        seed: of the initial weights, the episodes and the dropout; 0 to 2**62 - 1.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        threads: CPU threads; ``None``: as many as PyTorch takes by itself.
        protocol: Omniglot's split, ``"official"`` or ``"paper"``.
        eval_every: iterations between validations; 0: none, and all training classes train.
        eval_tasks: tasks of a validation, at least 2.
        checkpoint_every: iterations between checkpoints.
        time_limit: minutes after which to stop, with a checkpoint; ``None``: none.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or the algorithm or the data has no use for it.

    Example:
        >>> config = TrainConfig("maml", "sinusoid", "runs/sinusoid", steps=5)
        >>> config.shots, config.eval_steps, config.inner_lr
        (10, 5, 0.01)
    """

    algorithm: str
    data: str
    out: str
    ways: int = _UNSET
    shots: int = _UNSET
    queries: int = _UNSET
    meta_batch: int = _UNSET
    hidden: int = _UNSET
    pool: str | None = None
    train_ways: int | None = None
    metric: str | None = None
    steps: int | None = None
    eval_steps: int | None = None
    inner_lr: float | None = None
    first_order: bool = False
    learn_lr: bool = False
    inner_batch: int | None = None
    multi_step_iterations: int | None = None
    first_order_iterations: int | None = None
    regularization: float | None = None
    cg_steps: int | None = None
    cg_damping: float | None = None
    precision: str = "float32"
    optimizer: str | None = None
    lr: float = _UNSET
    lr_halve_every: int = 0
    lr_cosine: int | None = None
    iterations: int = 2000
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    protocol: str = "official"
    eval_every: int = 0
    eval_tasks: int = 100
    checkpoint_every: int = 200
    time_limit: float | None = None

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if not isinstance(self.data, str):
            raise TypeError(f"data: expected a string, got {type(self.data).__name__}")
        object.__setattr__(self, "out", str(self.out))
        self._check_applicable()
        for name, usual in self._usual_values().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        self._check_values()

    @property
    def regression(self) -> bool:
        """Whether tasks are regression: mean squared error takes the place of the accuracy."""
        return self.data == REGRESSION

    @property
    def title(self) -> str:
        """The run in words, e.g. ``"ProtoNet on omniglot"``."""
        return f"{NAMES[self.algorithm]} on {self.data.partition(':')[0]}"

    @property
    def score(self) -> str:
        """What a task is scored by: ``"accuracy"`` or ``"mse"``."""
        return "mse" if self.regression else "accuracy"

    def _check_applicable(self) -> None:
        if self.algorithm == "protonet" and self.regression:
            raise ValueError("data: sinusoid is regression, which protonet cannot do; use maml")
        if self.regression and self.pool is not None:
            raise ValueError("pool: the network for sinusoid has no such option")
        for name in _OF_SOME:
            given = getattr(self, name) not in (None, False)
            if given and name not in OPTIONS[self.algorithm]:
                raise ValueError(f"{name}: {self.algorithm} has no such option")

    def _usual_values(self) -> dict[str, Any]:
        usual: dict[str, Any]
        if self.regression:
            usual = {"ways": 1, "shots": 10, "queries": 10, "meta_batch": 25, "hidden": 40}
        else:
            usual = {"ways": 5, "shots": 1, "queries": 15, "hidden": 64, "pool": "max"}
            usual["meta_batch"] = 4 if self.algorithm == "protonet" else 16
        usual |= self._usual_outer_loop()
        if self.algorithm == "protonet":
            ways = usual["ways"] if self.ways is None else self.ways
            return usual | {"train_ways": ways, "metric": "sqeuclidean"}
        own = {"steps": 1, "inner_lr": 0.4, **_USUAL.get(self.algorithm, {})}
        if self.regression and self.algorithm != "reptile":
            own["inner_lr"] = 0.01
        own.setdefault("eval_steps", own["steps"] if self.steps is None else self.steps)
        return usual | own

    def _usual_outer_loop(self) -> dict[str, Any]:
        usual = "sgd" if self.algorithm == "reptile" else "adam"
        optimizer = usual if self.optimizer is None else self.optimizer
        check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
        outer: dict[str, Any] = {"optimizer": optimizer, "lr": OPTIMIZERS[optimizer]}
        falls = self.algorithm == "mamlpp" or (self.algorithm, optimizer) == ("reptile", "sgd")
        if falls and self.lr_halve_every == 0:
            outer["lr_cosine"] = self.iterations
        return outer

    def _check_values(self) -> None:
        check_count("ways", self.ways, least=1 if self.regression else 2)
        for name in ("shots", "queries", "meta_batch", "hidden", "checkpoint_every"):
            check_count(name, getattr(self, name), least=1)
        for name in ("lr_halve_every", "iterations", "eval_every"):
            check_count(name, getattr(self, name), least=0)
        check_count("eval_tasks", self.eval_tasks, least=2)
        check_count("seed", self.seed, least=0, below=2**62)
        if self.threads is not None:
            check_count("threads", self.threads, least=1)
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_choice("precision", self.precision, PRECISIONS)
        if not self.regression:
            check_choice("pool", self.pool, POOLS)
        check_positive("lr", self.lr)
        if self.lr_cosine is not None:
            check_count("lr_cosine", self.lr_cosine, least=0)
        if self.lr_cosine and self.lr_halve_every:
            raise ValueError("lr_cosine: lr_halve_every is given too, and they exclude each other")
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)
        check_device(self.device)
        if self.algorithm == "protonet":
            check_count("train_ways", self.train_ways, least=2)
            check_choice("metric", self.metric, METRICS)
        else:
            self._check_inner_loop()

    def _check_inner_loop(self) -> None:
        check_count("steps", self.steps, least=1)
        check_count("eval_steps", self.eval_steps, least=0)
        check_positive("inner_lr", self.inner_lr)
        if self.algorithm == "reptile":
            check_count("inner_batch", self.inner_batch, least=1)
        if self.algorithm == "mamlpp":
            check_count("eval_steps", self.eval_steps, least=0, below=(self.steps or 0) + 1)
            check_count("multi_step_iterations", self.multi_step_iterations, least=0)
            check_count("first_order_iterations", self.first_order_iterations, least=0)
        if self.algorithm == "imaml":
            check_positive("regularization", self.regularization)
            check_count("cg_steps", self.cg_steps, least=0)
            if self.cg_damping != 0:
                check_positive("cg_damping", self.cg_damping)


def check_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_device(name: str) -> None:
    """Raise ValueError unless ``name`` is a device of this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error


def read_options(out: Path) -> dict[str, Any]:
    """The options that the run in the folder ``out`` was begun or last resumed with.

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
    # A run from before an option was there lacks it, and is as if it had been left out.
    optional = {field.name: None for field in fields if field.default is None} | _BEFORE
    names = {field.name for field in fields}
    if not isinstance(options, dict) or set(options) | set(optional) != names:
        raise ValueError(f"{path} is damaged: it does not hold the options of a run")
    return optional | options


def check_same_run(options: dict[str, Any], begun: dict[str, Any]) -> None:
    """Raise ValueError where ``options`` would turn the run that was ``begun`` into another one."""
    for name, now in options.items():
        before = begun.get(name, _BEFORE.get(name))
        if before != now and name not in CHANGEABLE:
            raise ValueError(
                f"{name}: the run to resume began with {before!r}, got {now!r}; "
                "leave the option as it was, or train anew in another folder"
            )
