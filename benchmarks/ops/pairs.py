"""pair_scores and pair_pool beside what one writes without them: time, and memory.

    python -m benchmarks.ops.pairs
    python -m benchmarks.ops.pairs --threads 2

Prints tables in Markdown: milliseconds of fastmeta, and how many times as long the others take, all
float32, forward and backward to the inputs and all weights, in turns.

`pair_scores`: scores of all pairs of rows a [T, Q, D] and b [T, N, D], D = H, by a network with H
hidden units. "cat" takes the pairs through it, as relation networks are written; "split" splits
the first layer by hand, W1 cat(a, b) = W1a a + W1b b, and adds the halves of all pairs. Ours has
the same two products before the op. Memory is the growth of the process's peak, each in a process
of its own.

`pair_pool`: the first block of a relation network, conv + batch norm + relu + pool, of all pairs
of maps [64, 5, 5]. "cat" is the block in its usual form; "split" has two convolutions, and
the batch norm of all pairs; "statistics" takes the statistics from the halves, and adds, relus and
pools all pairs. Ours has the same statistics before the op.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from benchmarks.ops.distances import line
from benchmarks.ops.prototype_loss import peak_memory  # noqa: F401, of extra_memory's code
from fastmeta.models._pair_norm import normalize_pairs
from fastmeta.training.timing import interleave, ratio

OURS = "fastmeta"
# T, Q, N, H
SCORES = [(1, 320, 320, 64), (4, 300, 60, 256), (8, 300, 20, 64), (16, 75, 5, 64)]
# Queries and classes of one task: 5-way with 19 queries a class, 20-way with 10.
BLOCKS = {"5w1s": (95, 5), "20w1s": (200, 20)}
CHANNELS, SIZE, POOL = 64, 5, 2


@dataclass(frozen=True)
class Episode:
    """Inputs a, b that require gradients, and the weights of a network of pairs."""

    a: Tensor
    b: Tensor
    weights: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.a, self.b, *self.weights


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers that require gradients, divided by the root of their last dimension."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    return [x.requires_grad_() for x in made]


def rows(shape: tuple[int, int, int, int]) -> Episode:
    t, q, n, h = shape
    a, b, *weights = draw((t, q, h), (t, n, h), (h, 2 * h), (h,), (h,))
    return Episode(a, b, tuple(weights))


def halves(e: Episode) -> tuple[Tensor, Tensor]:
    """The first layer of all rows, split."""
    first, bias, _ = e.weights
    width = e.a.shape[2]
    return F.linear(e.a, first[:, :width], bias), F.linear(e.b, first[:, width:])


def all_pairs(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """cat(a[t, q], b[t, n]) along ``dim``."""
    shape = (*a.shape[:2], b.shape[1], *a.shape[2:])
    return torch.cat([a.unsqueeze(2).expand(shape), b.unsqueeze(1).expand(shape)], dim)


def scores_by_cat(e: Episode) -> Tensor:
    first, bias, last = e.weights
    return F.linear(all_pairs(e.a, e.b, 3), first, bias).relu() @ last


def scores_by_split(e: Episode) -> Tensor:
    x, y = halves(e)
    return (x.unsqueeze(2) + y.unsqueeze(1)).relu() @ e.weights[2]


def scores_by_op(e: Episode) -> Tensor:
    return fm.pair_scores(*halves(e), e.weights[2])


SCORERS = {OURS: scores_by_op, "cat": scores_by_cat, "split": scores_by_split}


class Block:
    """conv + batch norm + relu + pool of all pairs, in several ways, with one batch norm."""

    def __init__(self) -> None:
        self.norm = nn.BatchNorm2d(CHANNELS)

    def maps(self, queries: int, classes: int) -> Episode:
        maps = (CHANNELS, SIZE, SIZE)
        a, b, *weights = draw(
            (1, queries, *maps), (1, classes, *maps), (CHANNELS, 2 * CHANNELS, 3, 3)
        )
        norm_weights = self.norm.weight, self.norm.bias
        return Episode(a, b, (*weights, *norm_weights))

    def halves(self, e: Episode) -> tuple[Tensor, Tensor]:
        weight = e.weights[0]
        of_a = F.conv2d(e.a[0], weight[:, :CHANNELS], padding=1)
        of_b = F.conv2d(e.b[0], weight[:, CHANNELS:], padding=1)
        return of_a.unsqueeze(0), of_b.unsqueeze(0)

    def by_cat(self, e: Episode) -> Tensor:
        pairs = all_pairs(e.a, e.b, 3).flatten(0, 2)
        made = self.norm(F.conv2d(pairs, e.weights[0], padding=1))
        return F.max_pool2d(made.relu(), POOL)

    def by_split(self, e: Episode) -> Tensor:
        x, y = self.halves(e)
        made = self.norm((x.unsqueeze(2) + y.unsqueeze(1)).flatten(0, 2))
        return F.max_pool2d(made.relu(), POOL)

    def by_statistics(self, e: Episode) -> Tensor:
        x, y = normalize_pairs(*self.halves(e), self.norm)
        return F.max_pool2d((x.unsqueeze(2) + y.unsqueeze(1)).flatten(0, 2).relu(), POOL)

    def by_op(self, e: Episode) -> Tensor:
        return fm.pair_pool(*normalize_pairs(*self.halves(e), self.norm), POOL).flatten(0, 2)

    def ways(self) -> dict[str, Callable[[Episode], Tensor]]:
        return {
            OURS: self.by_op,
            "cat": self.by_cat,
            "split": self.by_split,
            "statistics": self.by_statistics,
        }


def step(function: Callable[[Episode], Tensor], e: Episode) -> Callable[[], tuple[Tensor, ...]]:
    """A call forward and backward, to all inputs and weights."""
    upstream = torch.linspace(-1, 1, function(e).numel()).view(function(e).shape)
    return lambda: torch.autograd.grad(function(e), e.leaves, upstream)


def check(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Raise unless all give the same gradients: else their times mean nothing."""
    expected = calls["cat"]()
    for call in calls.values():
        for g, e in zip(call(), expected, strict=True):
            error, most = (g - e).abs().max(), e.abs().max()
            if error > 1e-3 * most:
                raise RuntimeError(f"gradients differ by {error:.2g} of {most:.2g}")


def times(
    ways: dict[str, Callable[[Episode], Tensor]], e: Episode, rounds: int
) -> tuple[float, dict[str, float]]:
    """Our seconds, and how many times as long the others take."""
    calls = {name: step(way, e) for name, way in ways.items()}
    check(calls)
    taken = interleave(calls, rounds)
    others = {name: ratio(taken[name], taken[OURS]) for name in taken if name != OURS}
    return statistics.median(taken[OURS]), others


def extra_memory(shape: tuple[int, int, int, int], name: str) -> int:
    """Bytes by which a step raises the peak of a fresh process, warmed up on a small episode."""
    code = (
        "from benchmarks.ops.pairs import *\n"
        f"way = SCORERS[{name!r}]; step(way, rows((1, 4, 4, 64)))(); e = rows({shape!r})\n"
        "before = peak_memory(); grads = torch.autograd.grad(way(e).sum(), e.leaves)\n"
        "print(peak_memory() - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return int(output.stdout)


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(map(line, [head, ["---"] * len(head), *lines]))


def score_lines(rounds: int) -> list[list[str]]:
    lines = []
    for shape in SCORES:
        ours, others = times(SCORERS, rows(shape), rounds)
        memory = (f"{extra_memory(shape, name) / 1e6:.0f}" for name in SCORERS)
        cells = [", ".join(map(str, shape)), f"{1e3 * ours:.3g}"]
        lines.append([*cells, *(f"{x:.1f}" for x in others.values()), " / ".join(memory)])
    return lines


def block_lines(rounds: int) -> list[list[str]]:
    lines = []
    for name, (queries, classes) in BLOCKS.items():
        block = Block()
        ours, others = times(block.ways(), block.maps(queries, classes), rounds)
        cells = [f"{name}: {queries}, {classes}", f"{1e3 * ours:.3g}"]
        lines.append([*cells, *(f"{x:.1f}" for x in others.values())])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}, forward and backward\n")
    scorers = ["fastmeta, ms", "cat", "split", "MB: fastmeta / cat / split"]
    print(table(["pair_scores: T, Q, N, H", *scorers], score_lines(options.rounds)), "\n")
    ways = ["fastmeta, ms", "cat", "split", "statistics"]
    print(table(["pair_pool: Q, N", *ways], block_lines(options.rounds)))


if __name__ == "__main__":
    main()
