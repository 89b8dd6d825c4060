"""ridge_head beside the compositions that people write, forward and backward.

    python -m benchmarks.ops.ridge_head
    python -m benchmarks.ops.ridge_head --threads 2

Prints a table in Markdown: milliseconds of fastmeta, and how many times as long the dual form by
`torch.linalg.cholesky` and by `torch.linalg.solve` takes, with an intercept; and R2-D2's, which has
none, beside fastmeta without one. All are float32, take turns, and give gradients to the features
and the penalty.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastmeta as fm
from benchmarks.ops.distances import line
from fastmeta.training.timing import interleave, ratio

OURS = "fastmeta"
COLUMNS = ["T, S, D, N", OURS, "cholesky", "solve", "no intercept", "solve"]
SHAPES = [(32, 25, 1600, 5), (32, 25, 640, 5), (32, 25, 64, 5), (32, 5, 640, 5)]

Head = tuple[Tensor, ...]
Fit = Callable[[Tensor, Tensor, Tensor], Head]


def dual(x: Tensor, y: Tensor, l2: Tensor, *, by_cholesky: bool) -> Tensor:
    """W = Y' (X X' + l2)^-1 X."""
    system = x @ x.mT + l2 * torch.eye(x.shape[1])
    if by_cholesky:
        return torch.cholesky_solve(y, torch.linalg.cholesky(system)).mT @ x
    return torch.linalg.solve(system, y).mT @ x


def with_intercept(x: Tensor, y: Tensor, l2: Tensor, *, by_cholesky: bool) -> Head:
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    head = dual(x - mean_x, y - mean_y, l2, by_cholesky=by_cholesky)
    return head, (mean_y - mean_x @ head.mT).squeeze(1)


CONTENDERS: dict[bool, dict[str, Fit]] = {
    True: {
        OURS: lambda x, y, l2: fm.ridge_head(x, y, l2),
        "cholesky": partial(with_intercept, by_cholesky=True),
        "solve": partial(with_intercept, by_cholesky=False),
    },
    False: {
        OURS: lambda x, y, l2: fm.ridge_head(x, y, l2, bias=False)[:1],
        "solve": lambda x, y, l2: (dual(x, y, l2, by_cholesky=False),),
    },
}


def speeds(shape: tuple[int, int, int, int], intercept: bool, rounds: int) -> list[str]:
    """Our milliseconds, and each other contender's time as a multiple of it."""
    tasks, examples, features, ways = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, examples, features, generator=generator).requires_grad_()
    y = torch.eye(ways).repeat(tasks, examples // ways, 1)
    l2 = torch.tensor(1.0, requires_grad=True)
    fits = CONTENDERS[intercept]
    expected = fits["solve"](x, y, l2)
    upstream = [torch.randn(z.shape, generator=generator) for z in expected]
    for fit in fits.values():
        torch.testing.assert_close(fit(x, y, l2), expected, rtol=1e-3, atol=1e-4)
    calls = {
        name: lambda fit=fit: torch.autograd.grad(fit(x, y, l2), (x, l2), upstream)
        for name, fit in fits.items()
    }
    taken = interleave(calls, rounds)
    others = [f"{ratio(taken[name], taken[OURS]):.2f}" for name in fits if name != OURS]
    return [f"{1e3 * statistics.median(taken[OURS]):.3g}", *others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(line(COLUMNS))
    print(line(["---"] * len(COLUMNS)))
    for shape in SHAPES:
        cells = [speeds(shape, intercept, options.rounds) for intercept in (True, False)]
        print(line([", ".join(map(str, shape)), *cells[0], *cells[1]]))


if __name__ == "__main__":
    main()
