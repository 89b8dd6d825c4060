"""Schedules of the outer step size over a training."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_schedule(optimizer: Optimizer, iterations: int, floor: float = 0.01) -> LambdaLR:
    """Anneal the step size along half a cosine; it then stays at its lowest value.

    ``lr (floor + (1 - floor) (1 + cos(pi t)) / 2)`` with ``t = min(1, i / iterations)``
    (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).

    Args:
        optimizer: the optimizer whose ``lr`` is annealed.
        iterations: calls of ``step()`` until the lowest value, at least 1.
        floor: the lowest value as a share of ``lr``, 0 to 1.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = cosine_schedule(optimizer, 2, floor=0.0)
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     schedule.step()
        ...     print(round(optimizer.param_groups[0]["lr"], 6))
        0.5
        0.0
        0.0
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a number from 0 to 1, got {floor}")

    def share(i: int) -> float:
        t = min(1.0, i / iterations)
        return floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2

    return LambdaLR(optimizer, share)
