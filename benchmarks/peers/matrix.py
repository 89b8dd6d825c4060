"""The machine's matrix peak: the fastest float32 product of square matrices that torch can do."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.peers.modules import precision
from benchmarks.peers.step import Problem, Step, nothing

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
TRIES = 3


def product(problem: Problem) -> Step:
    """The product of the size with most operations a second."""
    wait = torch.cuda.synchronize if problem.device == "cuda" else nothing

    def operands(size: int) -> tuple[Tensor, Tensor, Tensor]:
        a, b = torch.randn(2, size, size, device=problem.device)
        return a, b, torch.empty_like(a)

    def speed(size: int) -> float:
        a, b, out = operands(size)
        taken = []
        for _ in range(TRIES + 1):
            begun = time.perf_counter()
            torch.mm(a, b, out=out)
            wait()
            taken.append(time.perf_counter() - begun)
        return 2 * size**3 / min(taken)

    size = max(SIZES[problem.device], key=speed)
    a, b, out = operands(size)
    return Step(
        run=lambda: torch.mm(a, b, out=out),
        read=lambda result: {},  # there is nothing to compare it with
        wait=wait,
        facts=precision(),
        flops=2.0 * size**3,
    )
