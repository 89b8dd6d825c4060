"""Episodes of tasks of unequal size, padded with label -1, and the same tasks one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.data import ClassTensors, Episode, Episodes
from tests.helpers.networks import joined


def ragged(device: str, dtype: torch.dtype = torch.float64, ways=(2, 4), shape=(5,)) -> Episode:
    """An episode of five tasks of 2 to 4 ways, 1 to 3 shots and 1 to 2 queries a class."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, *shape, generator=generator, dtype=torch.float64)
    source = ClassTensors(x, torch.arange(60) // 10)
    episodes = Episodes(source, ways, (1, 3), (1, 2), tasks=5, seed=2, device=device)
    episode = episodes[0].map_inputs(lambda x: x.to(dtype))
    assert len({tuple((y != -1).sum(1).tolist()) for y in (episode[1], episode[3])}) == 2
    return episode


def one_by_one(episode: Episode) -> list[Episode]:
    """The tasks without their padding."""
    found = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        s, q = support_y != -1, query_y != -1
        parts = support_x[s], support_y[s], query_x[q], query_y[q]
        found.append(Episode(*(part.unsqueeze(0) for part in parts)))
    return found


def with_garbage(episode: Episode) -> Episode:
    """The episode with NaN for the inputs of absent examples; the inputs require a gradient."""
    support_x, query_x = (
        x.masked_fill((y == -1).view(*y.shape, *[1] * (x.ndim - 2)), torch.nan).requires_grad_()
        for x, y in (episode[:2], episode[2:])
    )
    return episode._replace(support_x=support_x, query_x=query_x)


def assert_no_gradient_at_absent(episode: Episode) -> None:
    for x, y in (episode[:2], episode[2:]):
        assert (x.grad[y == -1] == 0).all()
        assert (x.grad[y != -1] != 0).any()


def encoder(device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).to(device, dtype)


def grads_of(module: nn.Module) -> Tensor:
    grads = joined(p.grad for p in module.parameters())
    module.zero_grad()
    return grads
