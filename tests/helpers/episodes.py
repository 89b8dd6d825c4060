"""Small episodes and encoders for tests of learners that compare embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.data import Episode

TASKS, WAYS, SHOTS, QUERIES = 2, 3, 2, 4


def episode(
    device: str = "cpu",
    shape: tuple[int, ...] = (6,),
    shots: int = SHOTS,
    ways: int = WAYS,
    dtype: torch.dtype = torch.float64,
) -> Episode:
    """Two tasks of three ways; support in class-major order."""
    generator = torch.Generator().manual_seed(0)
    examples = ways * (shots + QUERIES)
    x = torch.randn(TASKS, examples, *shape, generator=generator, dtype=torch.float64).to(dtype)
    support_x, query_x = x.split([ways * shots, ways * QUERIES], dim=1)
    support_y = torch.arange(ways).repeat_interleave(shots).repeat(TASKS, 1)
    query_y = torch.arange(ways).repeat(QUERIES).repeat(TASKS, 1)
    return Episode(*(part.to(device) for part in (support_x, support_y, query_x, query_y)))


def encoder(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Vectors of 6 numbers to 5."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(device, dtype)


def exact(actual: Tensor, expected: Tensor) -> None:
    """Equal to 12 digits."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
