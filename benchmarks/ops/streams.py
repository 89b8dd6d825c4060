"""Gradients of tasks that are differentiated again: streams of steps, and single steps.

    python -m benchmarks.ops.streams
    python -m benchmarks.ops.streams --threads 1 --rounds 9 --no-compile

`ttt_mlp` is a stream of 16 steps of a GELU MLP 64-128-64 for 16 sequences, its loss and all
gradients; the `titans` are one step of T memories and the backward through it. Prints a table in
Markdown: milliseconds of fastmeta, how many times as long the others take, and the peak of the
tensors in MiB, which is not seen inside torch.compile and JAX. All are float32, take turns and
agree with each other. JAX takes part if it is installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

import fastmeta as fm
from benchmarks.ops.distances import line
from benchmarks.peers.worker import use_threads
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.training.timing import interleave, ratio

OURS, REFERENCE = "fastmeta", "torch.func"
MEASURED = (OURS, "in segments", REFERENCE)  # whose memory is seen
COLUMNS = (*MEASURED, "torch.func, compiled", "JAX")


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


class Unrolled:
    """vmap(grad): a step's gradients, and the loss of a stream of steps."""

    def __init__(self, problem: Problem) -> None:
        self.steps = problem.case.steps
        self.gradients, self.losses = vmap(grad(problem.loss_of)), vmap(problem.loss_of)

    def of_stream(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        values = []
        for c in range(self.steps):
            values.append(self.losses(theta, x[:, c], y[:, c]))
            theta = theta - 0.1 * self.gradients(theta, x[:, c], y[:, c])
        return torch.stack(values).mean()

    def of_step(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.gradients(theta, x[:, 0], y[:, 0])

    def pulled(self, theta: Tensor, x: Tensor, y: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        return vjp(lambda theta, x: self.of_step(theta, x, y), theta, x)[1](upstream)


def unrolled(problem: Problem) -> list[Tensor]:
    """Autograd through the steps."""
    function, inputs = Unrolled(problem), (problem.theta, problem.x, problem.y)
    if problem.case.steps == 1:
        found = torch.autograd.grad(function.of_step(*inputs), problem.sources, problem.upstream)
    else:
        found = torch.autograd.grad(function.of_stream(*inputs), problem.sources)
    return list(found)


def compiled(problem: Problem) -> Callable[[], list[Tensor]]:
    """torch.func through the steps, all of it one function of torch.compile."""
    function = Unrolled(problem)
    inputs = [tensor.detach() for tensor in (problem.theta, problem.x, problem.y)]
    if problem.case.steps == 1:
        inputs.append(problem.upstream)
        call = torch.compile(function.pulled, dynamic=False)
    else:
        call = torch.compile(grad(function.of_stream, (0, 1)), dynamic=False)
    return lambda: list(call(*inputs))


def contenders(problem: Problem, compiles: bool) -> dict[str, Callable[[], list[Tensor]]]:
    found = {OURS: partial(ours, problem)}
    if problem.case.steps > 1:
        found["in segments"] = partial(ours, problem, "segments")
    found[REFERENCE] = partial(unrolled, problem)
    if compiles:
        found["torch.func, compiled"] = compiled(problem)
    if find_spec("jax") is not None:
        from benchmarks.ops import streams_jax

        found["JAX"] = streams_jax.contender(problem)
    return found


def peak(call: Callable[[], object]) -> float:
    with PeakBytes() as memory:
        call()
    return memory.peak / 2**20


def row(case: Case, rounds: int, compiles: bool) -> list[str]:
    problem = Problem(case)
    calls = contenders(problem, compiles)
    results = {name: call() for name, call in calls.items()}
    for name, found in results.items():
        for a, e in zip(found, results[REFERENCE], strict=True):
            error = (a - e).abs().max() / e.abs().max()
            if not error <= 1e-3:
                raise SystemExit(f"{case.name}: {name} differs from torch.func by {error:.0e}")
    memory = {name: f", {peak(calls[name]):.3g} MiB" for name in MEASURED if name in calls}
    seconds = interleave(calls, rounds)
    cells = [f"{1000 * statistics.median(seconds[OURS]):.3g} ms{memory[OURS]}"]
    for name in COLUMNS[1:]:
        times = f"{ratio(seconds[name], seconds[OURS]):.2f}" if name in calls else ""
        cells.append(times + memory.get(name, ""))
    layers = f"{case.width}-{case.hidden}-{case.width}"
    sizes = f"T {case.tasks}, C {case.steps}, B {case.examples}, {layers}"
    return [f"{case.name} ({sizes})", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.streams")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    use_threads(options.threads)  # of JAX, which is not imported yet
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}\n")
    columns = ["case", *COLUMNS]
    print(line(columns))
    print(line(["---"] * len(columns)))
    for case in CASES:
        print(line(row(case, options.rounds, not options.no_compile)), flush=True)


if __name__ == "__main__":
    main()
