"""Few-shot tasks on features, for the tests of heads."""

from __future__ import annotations

import torch
from torch import Tensor

T, N, SHOTS, Q, D = 3, 3, 2, 8, 10


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Support, labels and queries of T tasks, whose classes are clusters that overlap."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(T, N, D, generator=generator, dtype=torch.float64)
    labels = torch.arange(N).repeat(SHOTS).expand(T, -1).contiguous()
    support, query = (
        means[:, torch.arange(count) % N]
        + 0.8 * torch.randn(T, count, D, generator=generator, dtype=torch.float64)
        for count in (N * SHOTS, Q)
    )
    return support, labels, query
