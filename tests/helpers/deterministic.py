"""Numbers without a random generator, the same in every version of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wave(*shape: int, start: float = 0.0) -> Tensor:
    """Values in (-1, 1) of the default dtype."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count) * 0.7 + start).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    """The module with waves for parameters."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * wave(*parameter.shape, start=i))
    return module


def digest(*tensors: Tensor) -> list[float]:
    """One number a tensor, to which every element counts."""
    return [float((t.detach().flatten() * (wave(t.numel(), start=1) + 2)).sum()) for t in tensors]
