"""Rows of a batch by their indices, and the sums that take gradients back to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.absence import ABSENT
from fastmeta.ops._registration import as_function


def gather_rows(y: Tensor, indices: Tensor) -> Tensor:
    """Rows [T, M, D] of y [T, N, D] at indices [T, M], and zeros for ABSENT."""
    places = indices.clamp(min=0).unsqueeze(2).expand(-1, -1, y.shape[2])
    return y.gather(1, places).masked_fill((indices == ABSENT).unsqueeze(2), 0)


def _sum_rows(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    present = (indices != ABSENT).to(rows.dtype)
    # Sums of ones are exact, whatever their order.
    counts = rows.new_zeros(indices.shape[0], count).scatter_add(1, indices.clamp(min=0), present)
    means: Tensor = torch.ops.fastmeta.prototypes(rows, indices, count)
    return means * counts.unsqueeze(2)


class RowsAt(Function):
    """``gather_rows``; its transpose is SumAt."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, indices: Tensor) -> Tensor:
        return gather_rows(y, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, indices = inputs
        ctx.count = y.shape[1]
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        return sum_at(grad_rows, indices, ctx.count), None

    @staticmethod
    def jvp(ctx: Any, y_dot: Tensor, *_: Any) -> Tensor:
        return rows_at(y_dot, *ctx.saved_tensors)


class SumAt(Function):
    """Sums [T, N, D] of the rows [T, M, D] that have an index; no atomics, so the bits repeat."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, indices: Tensor, count: int) -> Tensor:
        return _sum_rows(rows, indices, count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, ctx.count = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:
        return rows_at(grad_sums, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, rows_dot: Tensor, *_: Any) -> Tensor:
        (indices,) = ctx.saved_tensors
        return sum_at(rows_dot, indices, ctx.count)


_rows_at = as_function(RowsAt)
_sum_at = as_function(SumAt)


def rows_at(y: Tensor, indices: Tensor) -> Tensor:
    """Rows [T, M, D] of y [T, N, D] at indices [T, M], and zeros for ABSENT. Differentiable."""
    # torch.compile has no second derivatives, and loses track of a nested Function.
    return gather_rows(y, indices) if torch.compiler.is_compiling() else _rows_at(y, indices)


def sum_at(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """Sums [T, count, D] of rows [T, M, D] by their indices [T, M], but ABSENT. Differentiable."""
    if torch.compiler.is_compiling():
        return _sum_rows(rows, indices, count)
    return _sum_at(rows, indices, count)
