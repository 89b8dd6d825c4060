"""One case of an op: reproducible arguments for a dtype and a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastmeta as fm

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CaseFactory:
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
    build: Callable[[CaseFactory], Arguments]
    small: bool  # few enough inputs for numerical differentiation
    call: Callable[..., torch.Tensor] | None = None  # None: the public function itself

    def __call__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Arguments:
        return self.build(CaseFactory(dtype, device))

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return self.call or getattr(fm, self.op)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def with_absent(labels: torch.Tensor) -> torch.Tensor:
    """Labels [T, E] of which every third is absent, and all of the last of several tasks."""
    labels = labels.clone()
    labels.flatten()[1::3] = -1
    if len(labels) > 1:
        labels[-1] = -1
    return labels


def unbatched(case: Case) -> Case:
    def build(make: CaseFactory) -> Arguments:
        args, options = case.build(make)
        return tuple(a[0] if isinstance(a, torch.Tensor) else a for a in args), options

    return Case(case.op, f"{case.name}-unbatched", build, case.small, case.call)
