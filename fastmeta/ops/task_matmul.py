"""Each task's matrix product: ``torch.bmm``, on a CPU of narrow matrices several times as fast.

Its derivatives are again such products, so one function serves every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core import backend
from fastmeta.core.backend import PRODUCT
from fastmeta.ops._registration import as_function, register, traces_transform


def _raw(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return torch.ops.fastmeta.task_product(a, b, transpose_a, transpose_b)


class Product(Function):
    """op(a) op(b), of which at most one is transposed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
        return _raw(a, b, transpose_a, transpose_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, *ctx.transposed = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        transpose_a, transpose_b = ctx.transposed
        # torch.compile has no second derivatives, and loses track of a nested Function.
        multiply = _raw if torch.compiler.is_compiling() else _apply
        of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_a = (
                multiply(b, g, False, True)
                if transpose_a
                else multiply(g, b, False, not transpose_b)
            )
        if ctx.needs_input_grad[1]:
            of_b = (
                multiply(g, a, True, False)
                if transpose_b
                else multiply(a, g, not transpose_a, False)
            )
        return of_a, of_b, None, None

    @staticmethod
    def jvp(ctx: Any, a_dot: Any, b_dot: Any, *_: Any) -> Tensor:
        a, b = ctx.saved_tensors
        if b_dot is None:
            return _apply(a_dot, b, *ctx.transposed)
        if a_dot is None:
            return _apply(a, b_dot, *ctx.transposed)
        return _apply(a_dot, b, *ctx.transposed) + _apply(a, b_dot, *ctx.transposed)


_apply = as_function(Product)


def _fake(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1 + transpose_a], b.shape[2 - transpose_b])


register(PRODUCT, _fake)


def has_kernel(x: Tensor) -> bool:
    """Whether the compiled product takes ``x``; where not, ``torch.bmm`` is what is meant to run."""
    if traces_transform() or torch.is_autocast_enabled("cpu"):
        return False
    return backend.is_available(PRODUCT, x)


def product(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) op(b) for a, b [T, ...] of one dtype and device; at most one is transposed."""
    if has_kernel(a):
        return _apply(a, b, transpose_a, transpose_b)
    return torch.bmm(a.mT if transpose_a else a, b.mT if transpose_b else b)
