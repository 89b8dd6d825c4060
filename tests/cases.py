"""The one table of op cases: tests and benchmarks run every op on what stands here.

A case builds the arguments of one public op for a dtype and device. Shapes are written T, Q, N, D
(or T, S, N, D; T, P) and cross the blocks of the kernels: 4 to 6 rows and 16 to 64 columns of a
tile, 48 and 128 rows of a block, 256 features of a slice, 1024 parameters of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastmeta as fm

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Maker:
    """Draws reproducible inputs of one dtype and device, the same numbers for every dtype."""

    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)

    def labels(self, classes: int, *shape: int) -> torch.Tensor:
        return torch.randint(classes, shape, generator=self.generator).to(self.device)


Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[Maker], Arguments]
    small: bool  # few enough inputs for numerical differentiation

    def __call__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Arguments:
        return self.build(Maker(dtype, device))

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return getattr(fm, self.op)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def inner_update_case(name: str, shape: tuple[int, ...], lr: Callable, **options: Any) -> Case:
    def build(make: Maker) -> Arguments:
        return (make.randn(*shape), make.randn(*shape), lr(make)), options

    size = 1
    for n in shape:
        size *= n
    return Case("inner_update", name, build, small=size <= 30)


def prototypes_case(name: str, t: int, s: int, n: int, d: int, missing: bool = False) -> Case:
    def build(make: Maker) -> Arguments:
        labels = make.labels(n - 1 if missing else n, t, s)
        return (make.randn(t, s, d), labels, n), {}

    return Case("prototypes", name, build, small=t * s * d <= 60)


def distance_case(metric: str, t: int, q: int, n: int, d: int) -> Case:
    def build(make: Maker) -> Arguments:
        return (make.randn(t, q, d), make.randn(t, n, d)), {"metric": metric}

    name = f"{metric}-{t}x{q}x{n}x{d}"
    return Case("pairwise_distance", name, build, small=t * (q + n) * d <= 60)


def loss_case(
    metric: str, reduction: str, t: int, q: int, n: int, d: int, scale: float = 1.0
) -> Case:
    def build(make: Maker) -> Arguments:
        rows = (make.randn(t, q, d), make.labels(n, t, q), make.randn(t, n, d))
        return rows, {"metric": metric, "reduction": reduction, "scale": scale}

    name = f"{metric}-{reduction}-{t}x{q}x{n}x{d}"
    return Case("prototype_loss", name, build, small=t * (q + n) * d <= 60)


def unbatched(case: Case) -> Case:
    def build(make: Maker) -> Arguments:
        args, options = case.build(make)
        return tuple(a[0] if isinstance(a, torch.Tensor) else a for a in args), options

    return Case(case.op, f"{case.name}-unbatched", build, case.small)


INNER_UPDATE = [
    inner_update_case("number", (3, 7), lambda make: 0.1),
    inner_update_case("scalar", (3, 7), lambda make: make.randn()),
    inner_update_case("per_element", (3, 7), lambda make: make.randn(7)),
    inner_update_case("per_task", (3, 7), lambda make: make.randn(3, 1)),
    inner_update_case("per_task_and_element", (3, 7), lambda make: make.randn(3, 7)),
    inner_update_case("per_layer", (3, 7), lambda make: make.randn(3), layer_sizes=(2, 4, 1)),
    inner_update_case("unbatched", (7,), lambda make: make.randn(7)),
    inner_update_case("one", (1, 1), lambda make: make.randn()),
    *(
        inner_update_case(f"blocks-{p}-{name}", (4, p), lr)
        for p in (1023, 1024, 1025, 3000)
        for name, lr in (
            ("scalar", lambda make: make.randn()),
            ("per_element", lambda make, p=p: make.randn(p)),
            ("per_task", lambda make: make.randn(4, 1)),
            ("per_task_and_element", lambda make, p=p: make.randn(4, p)),
        )
    ),
]

PROTOTYPES = [
    prototypes_case("2x5x3x4", 2, 5, 3, 4),
    prototypes_case("one", 1, 1, 1, 1),
    prototypes_case("missing_class", 2, 4, 5, 3, missing=True),
    unbatched(prototypes_case("2x5x3x4", 2, 5, 3, 4)),
    prototypes_case("slices", 3, 40, 7, 257),
    prototypes_case("proto_small", 2, 300, 60, 64),
]

PAIRWISE_DISTANCE = [
    *(distance_case(metric, 2, 4, 3, 2) for metric in METRICS),
    *(distance_case(metric, 1, 1, 1, 1) for metric in METRICS),
    *(distance_case(metric, 2, 7, 65, 17) for metric in METRICS),
    *(distance_case(metric, 1, 130, 129, 65) for metric in METRICS),
    distance_case("sqeuclidean", 3, 600, 31, 5),
    unbatched(distance_case("euclidean", 2, 4, 3, 2)),
]

PROTOTYPE_LOSS = [
    *(loss_case(metric, "mean", 2, 4, 3, 2) for metric in METRICS),
    *(loss_case("sqeuclidean", reduction, 2, 4, 3, 2, scale=0.7) for reduction in ("sum", "none")),
    loss_case("euclidean", "none", 2, 4, 3, 2, scale=2.0),
    loss_case("sqeuclidean", "mean", 2, 3, 1, 1),
    *(loss_case(metric, "mean", 2, 7, 65, 17, scale=0.5) for metric in METRICS),
    *(loss_case(metric, "none", 1, 130, 129, 65, scale=0.1) for metric in METRICS),
    loss_case("sqeuclidean", "sum", 2, 600, 31, 5),
    unbatched(loss_case("sqeuclidean", "none", 2, 4, 3, 2)),
    unbatched(loss_case("cosine", "mean", 2, 4, 3, 2)),
]

CASES = [*INNER_UPDATE, *PROTOTYPES, *PAIRWISE_DISTANCE, *PROTOTYPE_LOSS]
SMALL_CASES = [case for case in CASES if case.small]


def differentiable(args: tuple) -> list[int]:
    """Positions of the floating-point tensors among a case's arguments."""
    return [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def as_function(case: Case, args: tuple, options: dict[str, Any]) -> tuple[Callable, tuple]:
    """The op as a function of its floating-point tensors alone, and these tensors."""
    places = differentiable(args)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        full = list(args)
        for place, value in zip(places, inputs, strict=True):
            full[place] = value
        return case.function(*full, **options)

    return function, tuple(args[i] for i in places)
