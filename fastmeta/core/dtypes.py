"""Floating-point types, and the types in which their sums are accumulated."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16 and float16, else ``dtype``."""
    return torch.float32 if dtype in HALF else dtype
