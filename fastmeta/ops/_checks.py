"""Argument checks that the public ops share: what the argument takes, and what came."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")


def check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_together(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")


def check_dims(name: str, x: Tensor, shape: str) -> None:
    """``shape`` is written "[T, Q, D]"; the leading T may be missing."""
    dims = shape.count(",") + 1
    if x.dim() not in (dims, dims - 1):
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")


def check_labels(name: str, labels: Tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} must be on {device}, got {labels.device}")


def check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def check_rows(
    name: str, x: Tensor, other_name: str, other: Tensor, shape: str, other_shape: str
) -> None:
    """Two sets of rows, [T, Q, D] and [T, N, D], that agree in T and D."""
    for n, tensor, s in ((name, x, shape), (other_name, other, other_shape)):
        check_floating(n, tensor)
        check_dims(n, tensor, s)
    check_together(other_name, other, name, x)
    agree = x.dim() == other.dim() and x.shape[-1] == other.shape[-1]
    if not agree or x.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name} {shape} and {other_name} {other_shape} must agree in T and D, "
            f"got {list(x.shape)} and {list(other.shape)}"
        )
