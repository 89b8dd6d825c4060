"""Whether two implementations computed the same thing."""

from __future__ import annotations

import torch

# Norm of the error over the norm of the result. A product in TF32 is near 3e-4.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}
TF32_TOLERANCE = 2e-3


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN where either has one."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    a, e = actual.double().to(expected.device), expected.double()
    scale = e.norm().item()
    return (a - e).norm().item() / (scale or 1.0)
