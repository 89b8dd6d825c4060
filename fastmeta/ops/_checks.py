"""Argument checks that the public ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_dense
from fastmeta.core.dtypes import accumulation_dtype

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is a dense floating-point tensor."""
    check_dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless ``x`` has ``shape``."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")


def check_together(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype and one device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} like {other_name}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} like {other_name}, got {x.device}"
        )


def check_dims(name: str, x: Tensor, shape: str) -> None:
    """ValueError unless ``x`` has the dimensions of ``shape``, "[T, Q, D]", or all but T."""
    dims = shape.count(",") + 1
    if x.dim() not in (dims, dims - 1):
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")


def check_labels(name: str, labels: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``labels`` are int64 of ``shape`` on ``device``; values are not read."""
    _check_exactly(name, labels, torch.int64, shape, device)


def check_mask(name: str, mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``mask`` is bool of ``shape`` on ``device``."""
    _check_exactly(name, mask, torch.bool, shape, device)


def _check_exactly(
    name: str, x: Tensor, dtype: torch.dtype, shape: torch.Size, device: torch.device
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        way = "; use long()" if dtype == torch.int64 else ""
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}{way}")
    if x.shape != shape:
        way = "; use squeeze(-1)" if x.shape == (*shape, 1) else ""
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}{way}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_rows(
    name: str, x: Tensor, other_name: str, other: Tensor, shape: str, other_shape: str
) -> None:
    """Raise unless two sets of rows, [T, Q, D] and [T, N, D], agree in T and D."""
    for n, tensor, s in ((name, x, shape), (other_name, other, other_shape)):
        check_floating(n, tensor)
        check_dims(n, tensor, s)
    check_together(other_name, other, name, x)
    agree = x.dim() == other.dim() and x.shape[-1] == other.shape[-1]
    if not agree or x.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name} {shape} and {other_name} {other_shape}: expected the same T and {shape[-2]}, "
            f"got {list(x.shape)} and {list(other.shape)}"
        )


def step_size_like(lr: Tensor, x: Tensor, name: str) -> Tensor:
    """The step size ``lr`` in the accumulation dtype of ``x``, on its device. Differentiable.

    A 0-d tensor may come from another device, as PyTorch allows it in arithmetic.
    """
    check_floating("lr", lr)
    if lr.device != x.device and lr.dim():
        raise ValueError(f"lr: expected device {x.device} like {name}, got {lr.device}")
    return lr.to(device=x.device, dtype=accumulation_dtype(x.dtype))
