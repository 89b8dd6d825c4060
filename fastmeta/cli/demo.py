"""Demo: two learners meta-trained on embedded data, and the speed of the compiled ops."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.backend import backend_of, use_backend
from fastmeta.core.checks import check_positive
from fastmeta.data import Glyphs
from fastmeta.ops import inner_update, pairwise_distance, prototype_loss
from fastmeta.training.config import TrainConfig
from fastmeta.training.evaluation import evaluate_run
from fastmeta.training.loop import train
from fastmeta.training.plots import draw_curves
from fastmeta.training.timing import interleave, ratio

_ENDLESS = 10**9  # iterations: the time limit ends the training


def demo(out: Path, seconds: float = 30.0, tasks: int = 600, rounds: int = 15) -> None:
    """Meta-train ProtoNet and MAML, print accuracies and speeds, draw both learning curves.

    Args:
        out: folder of the two runs and of the picture ``learning_curves.png``. It is made;
            runs and picture in it are replaced.
        seconds: training time of each learner.
        tasks: evaluation tasks of each learner.
        rounds: number of timings of each op and backend.

    Raises:
        ValueError: ``seconds`` is not above 0, or there are fewer than two tasks.

    Example::

        demo(Path("demo"), seconds=10)
    """
    check_positive("seconds", seconds)
    say = partial(print, flush=True)
    say("Drawing characters of many scripts from matplotlib's fonts ...")
    for split, purpose in (("train", "to train on"), ("test", "to evaluate on")):
        say(f"  {Glyphs(split).num_classes:,} characters {purpose}")
    say(f"\nMeta-training ProtoNet and MAML, {seconds:g} s each ...")
    curves = []
    for config in configs(out, seconds):
        result = train(config, overwrite=True)
        found = evaluate_run(Path(config.out), tasks=tasks)
        say(f"  {found} ({result.iteration} iterations)")
        curves.append(result.curve)
    picture = out / "learning_curves.png"
    draw_curves(picture, curves, "accuracy", x="seconds")
    say(f"  learning curves in {picture}\n\n{speeds(rounds)}")


def configs(out: Path, seconds: float) -> list[TrainConfig]:
    """Options of the two training runs."""
    common: dict[str, Any] = {
        "data": "glyphs",
        "pool": "stride",
        "queries": 5,
        "lr": 3e-3,
        "iterations": _ENDLESS,
        "checkpoint_every": 1000,
        "time_limit": seconds / 60,
        "eval_every": 100,
        "eval_tasks": 100,
    }
    maml: dict[str, Any] = {"hidden": 32, "meta_batch": 4, "steps": 2, "eval_steps": 5}
    return [
        TrainConfig("protonet", out=str(out / "protonet"), train_ways=20, **common),
        TrainConfig("maml", out=str(out / "maml"), **maml, **common),
    ]


def has_native() -> bool:
    """Whether the compiled ops are built and not switched off."""
    return backend_of("prototype_loss", "cpu", torch.float32) == "native"


def speeds(rounds: int) -> str:
    """Table of the speed of the ops, native and in PyTorch, as text."""
    if not has_native():
        return "The compiled ops are not built, or switched off: PyTorch runs instead."
    threads = torch.get_num_threads()
    head = f"32 tasks, float32, {threads} CPU thread{'s' * (threads > 1)}"
    lines = [f"{head:43}{'native':>9}{'PyTorch':>9}"]
    for name, call in cases().items():
        native, fallback = (partial(_on, backend, call) for backend in ("native", "torch"))
        taken = interleave({"native": native, "fallback": fallback}, rounds)
        times = "".join(f"{1000 * statistics.median(seconds):9.2f}" for seconds in taken.values())
        faster = ratio(slow=taken["fallback"], fast=taken["native"])
        lines.append(f"  {name:41}{times} ms   {faster:.1f} times as fast")
    return "\n".join(lines)


def _on(backend: str, call: Callable[[], object]) -> None:
    with use_backend(backend):
        call()


def cases() -> dict[str, Callable[[], object]]:
    """Ops on 32 tasks: episodes of 64 features, and the weights of a Conv4."""
    generator = torch.Generator().manual_seed(0)
    params, grads = torch.randn(2, 32, 112_261, generator=generator)
    return {
        **_distances(5, 75, generator),
        **_distances(60, 300, generator),
        "inner_update": lambda: inner_update(params, grads, 0.4),
    }


def _distances(
    ways: int, queries: int, generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    """The ops on distances, forward and backward."""
    # Norm 1: between distant points softmax weights underflow, and PyTorch gets much slower.
    query, centres = (torch.randn(32, n, 64, generator=generator) / 8 for n in (queries, ways))
    query.requires_grad_(), centres.requires_grad_()
    labels = torch.arange(queries).remainder(ways).expand(32, -1)

    def loss() -> tuple[Tensor, ...]:
        value = prototype_loss(query, labels, centres)
        return torch.autograd.grad(value, (query, centres))

    def distance() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pairwise_distance(query, centres).sum(), (query, centres))

    return {
        f"prototype_loss and gradient, {ways}-way": loss,
        f"pairwise_distance and gradient, {ways}-way": distance,
    }
