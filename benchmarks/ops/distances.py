"""pairwise_distance and prototype_loss beside plain PyTorch, on ordinary and on large episodes.

    python -m benchmarks.ops.distances
    python -m benchmarks.ops.distances --threads 2 --no-compile

Prints a table in Markdown: milliseconds of fastmeta, and in brackets how many times as long the
fastest of the others takes: `torch.cdist` squared, |x|^2 + |y|^2 - 2 x.y, and the latter by
torch.compile; for the loss each with cross entropy behind it. All are float32 and take turns.
`bmm` is the time of fastmeta's forward as a multiple of the plain product's x y'.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from fastmeta.training.timing import interleave, ratio

OURS, PRODUCT = "fastmeta", "bmm"
COLUMNS = ["T, Q, N, D", "forward", "bmm", "forward and backward", "loss", "loss and backward"]

# T, Q, N, D
SHAPES = [
    *((tasks, 75, classes, width) for width, tasks in ((64, 32), (640, 8), (1600, 8))
      for classes in (5, 20, 60)),
    (32, 300, 60, 64),
    (1, 4096, 1024, 128),
    (1, 2048, 2048, 512),
]  # fmt: skip


@dataclass(frozen=True)
class Episode:
    """Rows x [T, Q, D] and y [T, N, D] that require gradients, and a label for each row of x."""

    x: Tensor
    y: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int]) -> Episode:
        tasks, queries, classes, width = shape
        generator = torch.Generator().manual_seed(0)
        x, y = (
            torch.randn(tasks, rows, width, generator=generator) / width**0.5
            for rows in (queries, classes)
        )
        labels = torch.randint(classes, (tasks, queries), generator=generator)
        return cls(x.requires_grad_(), y.requires_grad_(), labels)


def by_cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square()


def expanded(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(-1, keepdim=True) + y.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(norms, x, y.mT, alpha=-2)


Distance = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Episode], Tensor]


def loss_of(distance: Distance) -> Loss:
    def loss(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(-distance(x, y).flatten(0, 1), labels.flatten())

    return lambda e: loss(e.x, e.y, e.labels)


def distances(compiles: bool) -> dict[str, Distance]:
    found: dict[str, Distance] = {
        OURS: fm.pairwise_distance,
        "cdist": by_cdist,
        "expanded": expanded,
    }
    if compiles:
        found["compiled"] = torch.compile(expanded, dynamic=False)
    return found


def losses(compiles: bool) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        OURS: lambda e: fm.prototype_loss(e.x, e.labels, e.y),
        "cdist": loss_of(by_cdist),
        "expanded": loss_of(expanded),
    }
    if compiles:
        found["compiled"] = torch.compile(loss_of(expanded), dynamic=False)
    return found


def speed(calls: dict[str, Callable[[], object]], rounds: int) -> str:
    """Our time, and in brackets the fastest other one as a multiple of it."""
    taken = interleave(calls, rounds)
    ours = statistics.median(taken[OURS])
    others = {name: ratio(taken[name], taken[OURS]) for name in taken if name != OURS}
    fastest = min(others, key=lambda name: others[name])
    return f"{1e3 * ours:.3g} ({others[fastest]:.2f}, {fastest})"


def forward_only(function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: function(*arguments))


def with_backward(
    function: Callable[..., Tensor], e: Episode, *arguments: object
) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), (e.x, e.y), upstream)


def row(shape: tuple[int, int, int, int], rounds: int, compiles: bool) -> list[str]:
    """The cells of a shape."""
    torch.compiler.reset()  # another shape must not count as a recompilation
    e = Episode.draw(shape)
    of_distance, of_loss = distances(compiles), losses(compiles)
    product = interleave(
        {
            OURS: forward_only(torch.ops.fastmeta.pairwise_distance, e.x, e.y, "sqeuclidean"),
            PRODUCT: forward_only(lambda: e.x @ e.y.mT),
        },
        rounds,
    )
    return [
        ", ".join(map(str, shape)),
        speed({name: forward_only(f, e.x, e.y) for name, f in of_distance.items()}, rounds),
        f"{1 / ratio(product[PRODUCT], product[OURS]):.2f}",
        speed({name: with_backward(f, e, e.x, e.y) for name, f in of_distance.items()}, rounds),
        speed({name: forward_only(f, e) for name, f in of_loss.items()}, rounds),
        speed({name: with_backward(f, e, e) for name, f in of_loss.items()}, rounds),
    ]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=51, help="default 51; large shapes take 5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", nargs="+", type=int, metavar="ROW", help="numbers from 0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}, ms\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for number, shape in enumerate(SHAPES):
        if options.only is None or number in options.only:
            is_large = shape[1] > 1000
            rounds = min(5, options.rounds) if is_large else options.rounds
            print(line(row(shape, rounds, not options.no_compile)), flush=True)


if __name__ == "__main__":
    main()
