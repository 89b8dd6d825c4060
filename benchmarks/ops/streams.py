"""Gradients of tasks that are differentiated again: streams of steps, and single steps.

    python -m benchmarks.ops.streams
    python -m benchmarks.ops.streams --threads 1 --rounds 9

`ttt_mlp` is a stream of 16 steps of a GELU MLP 64-128-64 for 16 sequences, its loss and all
gradients; the `titans` are one step of T memories and the backward through it. Prints a table in
Markdown: milliseconds of fastmeta, how many times as long torch.func takes, and the peak of the
tensors in MiB. All are float32, take turns and agree with each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmeta as fm
from benchmarks.ops.distances import line
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.training.timing import interleave, ratio

OURS = "fastmeta"


class Case(NamedTuple):
    """T tasks, C steps of B examples, an MLP in - hidden - in."""

    name: str
    tasks: int
    steps: int
    examples: int
    width: int
    hidden: int


CASES = (
    Case("ttt_mlp", 16, 16, 64, 64, 128),
    Case("titans", 128, 1, 64, 64, 128),
    Case("titans_wide", 256, 1, 16, 64, 256),
    Case("titans_long", 32, 1, 512, 64, 128),
)


class Problem:
    """The networks' parameters [T, P], the examples, and an upstream gradient of a step."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        layers = nn.Linear(case.width, case.hidden), nn.GELU(), nn.Linear(case.hidden, case.width)
        self.net = nn.Sequential(*layers)
        self.layout = ParameterLayout.of(self.net)
        own = self.layout.flatten(dict(self.net.named_parameters())).detach()
        self.theta = own.expand(case.tasks, -1).clone().requires_grad_()
        shape = case.tasks, case.steps, case.examples, case.width
        self.x, self.y = torch.randn(shape).requires_grad_(), torch.randn(shape)
        self.upstream = torch.randn_like(self.theta)

    def loss_of(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.net, self.layout.views(theta), (x,)), y)

    @property
    def sources(self) -> list[Tensor]:
        return [self.theta, self.x]


def ours(problem: Problem, memory: str = "keep") -> list[Tensor]:
    if problem.case.steps == 1:
        x, y = problem.x[:, 0], problem.y[:, 0]
        grads = fm.task_gradient(problem.net, F.mse_loss, problem.theta, x, y).grads
        return list(torch.autograd.grad(grads, problem.sources, problem.upstream))
    maml = fm.MAML(problem.net, lr=0.1, loss=F.mse_loss)
    loss, _ = maml.stream_loss(problem.x, problem.y, start=problem.theta, memory=memory)
    return list(torch.autograd.grad(loss, problem.sources))


def unrolled(
    problem: Problem, gradients: Callable[..., Tensor], losses: Callable[..., Tensor]
) -> list[Tensor]:
    """vmap(grad), and autograd through the steps."""
    theta, values = problem.theta, []
    if problem.case.steps == 1:
        grads = gradients(theta, problem.x[:, 0], problem.y[:, 0])
        return list(torch.autograd.grad(grads, problem.sources, problem.upstream))
    for c in range(problem.case.steps):
        values.append(losses(theta, problem.x[:, c], problem.y[:, c]))
        theta = theta - 0.1 * gradients(theta, problem.x[:, c], problem.y[:, c])
    return list(torch.autograd.grad(torch.stack(values).mean(), problem.sources))


def contenders(problem: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    gradients, losses = vmap(grad(problem.loss_of)), vmap(problem.loss_of)
    found = {OURS: partial(ours, problem)}
    if problem.case.steps > 1:
        found["in segments"] = partial(ours, problem, "segments")
    found["torch.func"] = partial(unrolled, problem, gradients, losses)
    return found


def peak(call: Callable[[], object]) -> float:
    with PeakBytes() as memory:
        call()
    return memory.peak / 2**20


def row(case: Case, rounds: int) -> list[str]:
    problem = Problem(case)
    calls = contenders(problem)
    results = {name: call() for name, call in calls.items()}
    for name, found in results.items():
        for a, e in zip(found, results["torch.func"], strict=True):
            error = (a - e).abs().max() / e.abs().max()
            if error > 1e-3:
                raise SystemExit(f"{case.name}: {name} differs from torch.func by {error:.0e}")
    memory = {name: peak(call) for name, call in calls.items()}
    seconds = interleave(calls, rounds)
    cells = [f"{1000 * statistics.median(seconds[OURS]):.3g} ms, {memory[OURS]:.3g} MiB"]
    for name in ("in segments", "torch.func"):
        if name in calls:
            times = ratio(seconds[name], seconds[OURS])
            cells.append(f"{times:.2f}, {memory[name]:.3g} MiB")
        else:
            cells.append("")
    layers = f"{case.width}-{case.hidden}-{case.width}"
    sizes = f"T {case.tasks}, C {case.steps}, B {case.examples}, {layers}"
    return [f"{case.name} ({sizes})", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.streams")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}\n")
    columns = ["case", OURS, "in segments", "torch.func"]
    print(line(columns))
    print(line(["---"] * len(columns)))
    for case in CASES:
        print(line(row(case, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
