"""Parts of a measurement of `benchmarks.gpu.ops`.

A contender takes inputs and returns a tuple of tensors. Before anything is timed, they are compared
with the results of the plain PyTorch ops in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import fastmeta as fm
from benchmarks.common.agreement import TF32_TOLERANCE, TOLERANCE
from benchmarks.common.workloads import WORKLOADS, Workload

Inputs = tuple[torch.Tensor, ...]
Contender = Callable[..., Inputs]  # of the inputs
OURS = "fastmeta"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the workloads (T, Q, N, D, ...), numbers of repetitions, and dtypes."""

    small: tuple[int, int, int] = (300, 60, 64)  # Q, N, D of proto_small
    small_tasks: tuple[int, ...] = (1, 32)
    big: tuple[int, int, int] = (1_000_000, 10_000, 512)  # Q, N, D of proto_big
    big_checked: int = 4096  # queries of proto_big compared with float64
    big_chunk: int = 65_536  # queries at a time of the composition, whose Q x N does not fit
    updates: tuple[tuple[int, int], ...] = ((32, 112_261), (1, 100_000_000))
    support: tuple[int, int, int, int] = (256, 100, 20, 1600)  # T, S, N, D of prototypes
    pairs: tuple[int, int, int, int] = (8, 4096, 4096, 512)  # T, Q, N, D of pairwise_distance
    images: tuple[int, int, int, int] = (32, 75, 64, 14)  # T, B, C, H = W of task_conv2d
    head: tuple[int, int, int, int, int, int] = (32, 5, 25, 75, 5, 1600)  # T, K, S, Q, N, D of anil
    programs: tuple[Workload, ...] = tuple(
        WORKLOADS[name] for name in ("sin1", "sin5", "omni_mlp", "hvp_mlp_t1")
    )
    image_programs: tuple[Workload, ...] = tuple(
        WORKLOADS[name] for name in ("omni_paper", "omni_20w", "mini_conv5")
    )
    copy_bytes: int = 1 << 30
    matrix: int = 8192
    rounds: int = 30
    long_rounds: int = 5
    graph: int = 20  # calls in a graph, and calls between two events


@dataclass(frozen=True)
class Measure:
    op: str
    workload: str
    what: str  # forward, backward or forward + backward
    dtype: torch.dtype
    contenders: Mapping[str, Contender]
    draw: Callable[[torch.Generator], Inputs]
    rounds: int
    calls: int  # between two readings of the clock
    in_graph: bool = False  # all calls in one graph
    checked: Callable[[Inputs], Inputs] = lambda inputs: inputs  # the part that is compared
    moved: int = 0  # bytes that a call must read and write
    flops: int = 0  # that a call must do
    memory: bool = False  # measure the peak
    tf32: bool = False  # allowed for convolutions
    jumps: bool = False  # gradients do, where rounding tips over a ReLU or a maximum

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        return TF32_TOLERANCE if self.tf32 else TOLERANCE[self.dtype]


def in_torch(contender: Contender) -> Contender:
    """Make the same contender with fastmeta's plain-PyTorch backend."""

    def run(*inputs: torch.Tensor) -> Inputs:
        with fm.use_backend("torch"):
            return contender(*inputs)

    return run
