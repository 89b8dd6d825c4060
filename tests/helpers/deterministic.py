"""Deterministic numbers without a random generator, the same in every version of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wave(*shape: int, start: float = 0.0) -> Tensor:
    """Return values in (-1, 1) of the default dtype."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count) * 0.7 + start).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    """Fill the module's parameters with waves."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * wave(*parameter.shape, start=i))
    return module


def digest(*tensors: Tensor) -> list[float]:
    """Reduce each tensor to one number that depends on every element."""
    return [float((t.detach().flatten() * (wave(t.numel(), start=1) + 2)).sum()) for t in tensors]
