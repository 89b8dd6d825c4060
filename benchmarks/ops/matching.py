"""matching_loss beside compositions of PyTorch's ops: time, and memory.

    python -m benchmarks.ops.matching
    python -m benchmarks.ops.matching --threads 2 --metric sqeuclidean
    python -m benchmarks.ops.matching --memory

Prints a table in Markdown, of forward and backward to queries and supports: milliseconds of
fastmeta, and how many times as long each of the others takes. `exact` is the same formula, a mask
and two logsumexp; `attention` is the paper's as it is usually written: softmax, a product with
one-hot labels, the logarithm of 1e-6 more. All are float32 and take turns. `--memory` prints the
growth of the process's peak beyond the gradients, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from benchmarks.ops.prototype_loss import peak_memory
from fastmeta.training.timing import interleave, ratio

OURS = "fastmeta"

# T, Q, S, D
SHAPES = [
    (32, 75, 5, 64),
    (32, 75, 25, 64),
    (16, 300, 100, 64),
    (4, 300, 300, 64),
    (1, 4000, 4000, 512),
]


@dataclass(frozen=True)
class Episode:
    """Queries [T, Q, D] and supports [T, S, D] that require gradients, with their labels."""

    query: Tensor
    query_labels: Tensor
    support: Tensor
    support_labels: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int]) -> Episode:
        tasks, queries, supports, width = shape
        ways = 5 if supports <= 25 else 20
        generator = torch.Generator().manual_seed(0)
        query, support = (
            torch.randn(tasks, rows, width, generator=generator) / width**0.5
            for rows in (queries, supports)
        )
        labels = torch.randint(ways, (tasks, queries), generator=generator)
        of_support = torch.arange(supports).remainder(ways).expand(tasks, supports).contiguous()
        return cls(query.requires_grad_(), labels, support.requires_grad_(), of_support)


def logits_of(e: Episode, metric: str, scale: float) -> Tensor:
    if metric == "cosine":
        return scale * F.normalize(e.query, dim=-1) @ F.normalize(e.support, dim=-1).mT
    norms = e.query.square().sum(-1, keepdim=True) + e.support.square().sum(-1).unsqueeze(1)
    return -scale * torch.baddbmm(norms, e.query, e.support.mT, alpha=-2)


def ours(e: Episode, metric: str, scale: float) -> Tensor:
    labels = e.query_labels, e.support_labels
    return fm.matching_loss(e.query, labels[0], e.support, labels[1], metric, scale)


def exact(e: Episode, metric: str, scale: float) -> Tensor:
    logits = logits_of(e, metric, scale)
    other = e.query_labels.unsqueeze(2) != e.support_labels.unsqueeze(1)
    return (logits.logsumexp(2) - logits.masked_fill(other, -math.inf).logsumexp(2)).mean()


def attention(e: Episode, metric: str, scale: float) -> Tensor:
    weights = logits_of(e, metric, scale).softmax(2)
    one_hot = F.one_hot(e.support_labels).to(weights.dtype)
    probability = (weights @ one_hot).gather(2, e.query_labels.unsqueeze(2))
    return -(probability + 1e-6).log().mean()


Loss = Callable[[Episode, str, float], Tensor]
LOSSES: dict[str, Loss] = {OURS: ours, "exact": exact, "attention": attention}


def with_backward(loss: Loss, e: Episode, metric: str, scale: float) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(e, metric, scale), (e.query, e.support))


def row(shape: tuple[int, int, int, int], metric: str, rounds: int) -> list[str]:
    """The cells of a shape."""
    e, scale = Episode.draw(shape), 10.0 if metric == "cosine" else 1.0
    calls = {name: with_backward(loss, e, metric, scale) for name, loss in LOSSES.items()}
    taken = interleave(calls, rounds)
    others = [f"{ratio(taken[name], taken[OURS]):.2f}" for name in LOSSES if name != OURS]
    return [", ".join(map(str, shape)), f"{1e3 * statistics.median(taken[OURS]):.3g}", *others]


def print_growth(name: str, shape: tuple[int, int, int, int], metric: str) -> None:
    """Print the growth in MB of this process's peak by one call, beyond the gradients."""
    warm = Episode.draw((1, 8, 8, shape[3]))
    with_backward(LOSSES[name], warm, metric, 1.0)()
    e = Episode.draw(shape)
    before = peak_memory()
    with_backward(LOSSES[name], e, metric, 1.0)()
    gradients = 4 * (e.query.numel() + e.support.numel())
    print(f"{(peak_memory() - before - gradients) / 2**20:.1f}")


def growth_of(name: str, shape: tuple[int, int, int, int], options: argparse.Namespace) -> str:
    command = [sys.executable, "-m", "benchmarks.ops.matching", "--growth", name, *map(str, shape)]
    command += ["--metric", options.metric, "--threads", str(options.threads)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="default 101; the last shape 5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--metric", choices=("cosine", "sqeuclidean"), default="cosine")
    parser.add_argument("--only", nargs="+", type=int, metavar="ROW", help="numbers from 0")
    parser.add_argument("--memory", action="store_true", help="MB instead of times")
    parser.add_argument("--growth", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.growth:
        name, *sizes = options.growth
        print_growth(name, tuple(map(int, sizes)), options.metric)
        return
    what = "MB beyond the gradients" if options.memory else "ms, others as multiples"
    print(f"{options.metric}, {options.threads} threads, torch {torch.__version__}, {what}\n")
    columns = ["T, Q, S, D", *LOSSES]
    print(line(columns), line(["---"] * len(columns)), sep="\n", flush=True)
    for number, shape in enumerate(SHAPES):
        if options.only is not None and number not in options.only:
            continue
        if options.memory:
            cells = [", ".join(map(str, shape)), *(growth_of(n, shape, options) for n in LOSSES)]
        else:
            is_large = shape[1] > 1000
            rounds = min(5, options.rounds) if is_large else options.rounds
            cells = row(shape, options.metric, rounds)
        print(line(cells), flush=True)


if __name__ == "__main__":
    main()
