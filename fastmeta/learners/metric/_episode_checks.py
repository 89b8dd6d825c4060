"""Checks of the examples and labels of a batch of tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_dense


def check_examples(name: str, x: Tensor, y: Tensor) -> None:
    """Raise unless x is ``[T, B, ...]`` and y one int64 label an example, ``[T, B]``.

    ``name`` is "support" or "query". Values are not read.
    """
    for argument, value in ((f"{name}_x", x), (f"{name}_y", y)):
        check_dense(argument, value)
    if x.ndim < 3:
        raise ValueError(f"{name}_x: expected shape [T, examples, ...], got {list(x.shape)}")
    if y.shape != x.shape[:2]:
        raise ValueError(
            f"{name}_y: expected shape {list(x.shape[:2])}, one label an example of {name}_x, "
            f"got {list(y.shape)}{'; use squeeze(-1)' if y.shape == (*x.shape[:2], 1) else ''}"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"{name}_y: expected int64 labels, got {y.dtype}; use long()")


def check_alike(support_x: Tensor, query_x: Tensor) -> None:
    """Raise unless queries are of as many tasks, and of the same kind, as the support."""
    expected = (len(support_x), *support_x.shape[2:])
    if (len(query_x), *query_x.shape[2:]) != expected:
        tail = ", ".join(str(size) for size in expected[1:])
        raise ValueError(
            f"query_x: expected shape [{expected[0]}, Q, {tail}] as of support_x, "
            f"got {list(query_x.shape)}"
        )
    for attribute, error in (("dtype", TypeError), ("device", ValueError)):
        value, got = getattr(support_x, attribute), getattr(query_x, attribute)
        if value != got:
            raise error(f"query_x: expected support_x's {attribute} {value}, got {got}")
