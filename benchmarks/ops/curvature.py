"""Products of a Hessian and a Gauss-Newton matrix with many vectors at one point.

    python -m benchmarks.ops.curvature
    python -m benchmarks.ops.curvature --threads 2 --vectors 100

Prints a table in Markdown: milliseconds of `MAML.hvp` and `MAML.ggnvp` on 784-256-64-10 with 256
examples, and how many times as long the others take: curvlinops' operators, or the way they go
where they are not installed; torch.func with the primal passes shared; the vectors one by one. All
are float32, take turns and agree with float64.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap

import fastmeta as fm
from benchmarks.ops.distances import line
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.training.timing import interleave, ratio

OURS, SIZES, EXAMPLES = "fastmeta", [784, 256, 64, 10], 256

Product = Callable[[Tensor], Tensor]


class Problem:
    """A network, its parameters [P] and a batch, in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(1)  # no activation is so near a kink that float32 is on its other side
        self.net = fm.models.MLP(SIZES).to(dtype)
        self.maml = fm.MAML(self.net)
        self.layout = ParameterLayout.of(self.net)
        self.theta = self.layout.flatten(dict(self.net.named_parameters())).detach()
        self.x = torch.randn(EXAMPLES, SIZES[0]).to(dtype)
        self.y = torch.randint(SIZES[-1], (EXAMPLES,))

    def outputs(self, theta: Tensor) -> Tensor:
        return functional_call(self.net, self.layout.views(theta), (self.x,))

    def loss(self, theta: Tensor) -> Tensor:
        return F.cross_entropy(self.outputs(theta), self.y)

    def ours(self, name: str, vectors: Tensor) -> Tensor:
        product = getattr(self.maml, name)
        return product(self.theta, (self.x[None], self.y[None]), vectors[:, None])[:, 0]

    def one_by_one(self, name: str, vectors: Tensor) -> Tensor:
        return torch.cat([self.ours(name, vector[None]) for vector in vectors])


def shared(problem: Problem, name: str, vectors: Tensor) -> Tensor:
    """torch.func, with one graph for all vectors."""
    if name == "hvp":
        _, pull = vjp(torch.func.grad(problem.loss), problem.theta)
        return vmap(lambda v: pull(v)[0])(vectors)
    x, y = problem.x[None], problem.y[None]
    theta, views = problem.theta[None], problem.layout.views

    def forward(theta: Tensor, x: Tensor) -> Tensor:
        return functional_call(problem.net, views(theta), (x,))

    return fm.ggnvp(forward, F.cross_entropy, theta, vectors[:, None], x, y)[:, 0]


def as_curvlinops(problem: Problem, name: str, vectors: Tensor) -> Tensor:
    """The way of curvlinops 3: vmap over vectors of jvp(jacrev), or of J' H_L J v."""

    def hessian(v: Tensor) -> Tensor:
        return jvp(jacrev(problem.loss), (problem.theta,), (v,))[1]

    def gauss_newton(v: Tensor) -> Tensor:
        outputs, along = jvp(problem.outputs, (problem.theta,), (v,))
        bent = jvp(torch.func.grad(lambda z: F.cross_entropy(z, problem.y)), (outputs,), (along,))
        return vjp(problem.outputs, problem.theta)[1](bent[1])[0]

    with torch.no_grad():
        return vmap(hessian if name == "hvp" else gauss_newton)(vectors)


def curvlinops(problem: Problem, name: str) -> Product | None:
    """Its own operator, if it is installed; times the columns [P, K]."""
    if find_spec("curvlinops") is None:
        return None
    kind = "HessianLinearOperator" if name == "hvp" else "GGNLinearOperator"
    operator = getattr(import_module("curvlinops"), kind)(
        problem.net,
        torch.nn.CrossEntropyLoss(),
        list(problem.net.parameters()),
        [(problem.x, problem.y)],
        check_deterministic=False,
    )
    return lambda vectors: (operator @ vectors.T).T


def contenders(name: str, problem: Problem) -> dict[str, Product]:
    found: dict[str, Product] = {
        OURS: partial(problem.ours, name),
        "one by one": partial(problem.one_by_one, name),
        "torch.func": partial(shared, problem, name),
        "curvlinops' way": partial(as_curvlinops, problem, name),
    }
    own = curvlinops(problem, name)
    return found if own is None else {**found, "curvlinops": own}


def row(name: str, count: int, rounds: int) -> list[str]:
    """The cells of a product."""
    exact, problem = Problem(torch.float64), Problem(torch.float32)
    vectors = torch.randn(count, problem.layout.numel)
    expected = shared(exact, name, vectors.double())
    calls = {}
    for label, product in contenders(name, problem).items():
        error = (product(vectors) - expected).abs().max() / expected.abs().max()
        if error > 1e-4:
            raise RuntimeError(f"{label}: the error of {name} is {error:.1e}")
        calls[label] = partial(product, vectors)
    taken = interleave(calls, rounds)
    ours = f"{1e3 * statistics.median(taken[OURS]):.3g}"
    others = {label: f"{ratio(taken[label], taken[OURS]):.2f}" for label in calls if label != OURS}
    threads = str(torch.get_num_threads())
    return [name, threads, ours, *(others.get(label, "") for label in COLUMNS[3:])]


COLUMNS = ["product", "threads", OURS, "one by one", "torch.func", "curvlinops' way", "curvlinops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="default 21")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vectors", type=int, default=16, help="default 16")
    options = parser.parse_args()
    print(f"{options.vectors} vectors, torch {torch.__version__}, ms\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in ("hvp", "ggnvp"):
            print(line(row(name, options.vectors, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
