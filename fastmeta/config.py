"""What a training run is: its options, their usual values, and which a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmeta.data._checks import check_choice, check_count
from fastmeta.ops._checks import METRICS

ALGORITHMS = ("protonet", "maml")
PROTOCOLS = ("official", "paper")
POOLS = ("max", "stride")
PRECISIONS = ("float32", "bfloat16")
REGRESSION = "sinusoid"
_UNSET: Any = None

# Options that say how far and where a run goes, not what it computes.
CHANGEABLE = {
    *("out", "iterations", "time_limit", "checkpoint_every", "eval_tasks", "device", "threads"),
}
_PROTONET_ONLY = ("metric", "train_ways")
_MAML_ONLY = ("steps", "eval_steps", "inner_lr", "first_order", "learn_lr")


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run; a config that exists is valid and complete.

    An option left out takes its usual value, where that depends on the data or the algorithm too.

    Args:
        algorithm: ``"protonet"`` or ``"maml"``.
        data: ``"omniglot:PATH"``, ``"glyphs"`` or ``"sinusoid"`` (regression, MAML only).
        out: the run's folder; it is made.
        ways: classes a task, in evaluation and, but for ``train_ways``, in training (5).
        shots: support examples a class (1; sinusoid 10).
        queries: query examples a class (15; sinusoid 10).
        meta_batch: tasks an iteration (protonet 4, maml 16; sinusoid 25).
        hidden: channels of Conv4's layers (64), or units of the sinusoid network's two (40).
        pool: images: how Conv4 halves them, ``"max"`` pooling or ``"stride"``, 3.7 times less work.
        train_ways: protonet: classes a training task (``ways``); more make better embeddings.
        metric: protonet: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        steps: maml: inner steps in training (1).
        eval_steps: maml: inner steps in evaluation (``steps``).
        inner_lr: maml: step size of the inner loop (0.4; sinusoid 0.01).
        first_order: maml: leave the second derivatives out.
        learn_lr: maml: learn the inner step sizes, from ``inner_lr`` on.
        precision: of training: ``"float32"``, or ``"bfloat16"``: autocast, weights and evaluation
            stay float32. Quick where the hardware multiplies bfloat16 matrices.
        lr: step size of Adam, which does the outer loop.
        lr_halve_every: iterations after which ``lr`` halves, again and again; 0: constant.
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
    precision: str = "float32"
    lr: float = 1e-3
    lr_halve_every: int = 0
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
        name = {"protonet": "ProtoNet", "maml": "MAML"}[self.algorithm]
        return f"{name} on {self.data.partition(':')[0]}"

    @property
    def score(self) -> str:
        """What a task is scored by: ``"accuracy"`` or ``"mse"``."""
        return "mse" if self.regression else "accuracy"

    def _check_applicable(self) -> None:
        if self.algorithm == "protonet" and self.regression:
            raise ValueError("data: sinusoid is regression, which protonet cannot do; use maml")
        if self.regression and self.pool is not None:
            raise ValueError("pool: the network for sinusoid has no such option")
        foreign = _MAML_ONLY if self.algorithm == "protonet" else _PROTONET_ONLY
        for name in foreign:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name}: {self.algorithm} has no such option")

    def _usual_values(self) -> dict[str, Any]:
        usual: dict[str, Any]
        if self.regression:
            usual = {"ways": 1, "shots": 10, "queries": 10, "meta_batch": 25, "hidden": 40}
        else:
            usual = {"ways": 5, "shots": 1, "queries": 15, "hidden": 64, "pool": "max"}
            usual["meta_batch"] = 4 if self.algorithm == "protonet" else 16
        if self.algorithm == "protonet":
            ways = usual["ways"] if self.ways is None else self.ways
            return usual | {"train_ways": ways, "metric": "sqeuclidean"}
        steps = 1 if self.steps is None else self.steps
        inner_lr = 0.01 if self.regression else 0.4
        return usual | {"steps": steps, "eval_steps": steps, "inner_lr": inner_lr}

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
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)
        check_device(self.device)
        if self.algorithm == "protonet":
            check_count("train_ways", self.train_ways, least=2)
            check_choice("metric", self.metric, METRICS)
        else:
            check_count("steps", self.steps, least=1)
            check_count("eval_steps", self.eval_steps, least=0)
            check_positive("inner_lr", self.inner_lr)


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
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(options, dict) or set(options) != names:
        raise ValueError(f"{path} is damaged: it does not hold the options of a run")
    return options


def check_same_run(options: dict[str, Any], begun: dict[str, Any]) -> None:
    """Raise ValueError where ``options`` would turn the run that was ``begun`` into another one."""
    for name, now in options.items():
        if begun[name] != now and name not in CHANGEABLE:
            raise ValueError(
                f"{name}: the run to resume began with {begun[name]!r}, got {now!r}; "
                "leave the option as it was, or train anew in another folder"
            )
