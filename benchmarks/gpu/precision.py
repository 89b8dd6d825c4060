"""PyTorch's settings of the precision of float32, for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Precision of float32 matrix products: "highest" is IEEE float32, "high" allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    """Whether PyTorch allows TF32 for float32 convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
