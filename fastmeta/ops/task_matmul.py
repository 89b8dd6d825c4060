"""Each task's matrix product: ``torch.bmm``, or a CPU kernel for narrow matrices.

The kernel is several times as fast. Derivatives are products too: one Function serves every order.
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
    """op(a) op(b), where op is a transposition of at most one of them."""

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
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        transpose_a, transpose_b = ctx.transposed
        # torch.compile has no second derivatives, and loses track of a nested Function.
        multiply = _raw if torch.compiler.is_compiling() else _apply
        # The gradient of a transposed matrix comes out transposed, as factors in the other order.
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = (
                multiply(b, grad, False, True)
                if transpose_a
                else multiply(grad, b, False, not transpose_b)
            )
        if ctx.needs_input_grad[1]:
            grad_b = (
                multiply(grad, a, True, False)
                if transpose_b
                else multiply(a, grad, not transpose_a, False)
            )
        return grad_a, grad_b, None, None

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
    """Whether the compiled product takes ``x``; if not, ``torch.bmm`` runs."""
    # Autocast is told apart here: it would change the dtype of ``torch.bmm``, not of a custom op.
    if traces_transform() or torch.is_autocast_enabled("cpu"):
        return False
    return backend.is_available(PRODUCT, x)


def product(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """op(a) op(b) for a, b [T, ...] of one dtype and device; at most one is transposed."""
    if has_kernel(a):
        return _apply(a, b, transpose_a, transpose_b)
    return torch.bmm(a.mT if transpose_a else a, b.mT if transpose_b else b)
