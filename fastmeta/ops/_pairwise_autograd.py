"""Derivatives of every order for ops of two sets of rows, out = f(x, y).

The compiled op gives f and its gradient. All other derivatives follow from the tangent of f,
written once in plain PyTorch. With <g, f> the objective and H its Hessian in (x, y):

    jvp of f in direction v         tangent(v)
    derivative of the gradient      in g: tangent(v);  in (x, y): H v = gradient of <g, tangent(v)>
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops._registration import as_function

Rows = tuple[Tensor, Tensor]


class Options(NamedTuple):
    """Arguments of an op after x and y. torch.compile wants a fixed number of them."""

    x_labels: Tensor | None
    y_labels: Tensor | None
    rest: tuple[Any, ...]  # no tensors

    @property
    def given(self) -> tuple[Any, ...]:
        """The arguments that the op has."""
        return (*(labels for labels in self[:2] if labels is not None), *self.rest)


@dataclass(frozen=True, eq=False)
class PairwiseOp:
    """An op of two sets of rows and of ``Options.given``.

    Attributes:
        forward: (x, y, *options) -> out.
        backward: (grad_out, x, y, *options) -> grad_x, grad_y.
        tangent: (x, y, x_dot, y_dot, *options) -> out_dot, in plain PyTorch.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Rows]
    tangent: Callable[..., Tensor]


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def hessian_vector_product(
    tangent: Callable[..., Tensor],
    g: Tensor,
    rows: Rows,
    direction: tuple[Tensor | None, ...],
    options: Options,
) -> Rows:
    """H v of <g, f> for v = ``direction``, None meaning zero."""
    v = tuple(_or_zeros(d, r) for d, r in zip(direction, rows, strict=True))
    pullback = torch.func.vjp(lambda x, y: tangent(x, y, *v, *options.given), *rows)[1]
    return pullback(g)


def save(ctx: Any, tensors: tuple[Tensor, ...], options: Options) -> None:
    """Keep the inputs of an op for ``saved``."""
    ctx.rest = options.rest
    ctx.save_for_backward(*tensors, *options[:2])
    ctx.save_for_forward(*tensors, *options[:2])


def saved(ctx: Any) -> tuple[tuple[Tensor, ...], Options]:
    """The tensors and the options that ``save`` kept."""
    *tensors, x_labels, y_labels = ctx.saved_tensors
    return tuple(tensors), Options(x_labels, y_labels, ctx.rest)


class Pairwise(Function):
    """``op.forward(x, y, *options.given)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: PairwiseOp,
        x: Tensor,
        y: Tensor,
        x_labels: Tensor | None,
        y_labels: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        return op.forward(x, y, *Options(x_labels, y_labels, rest).given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, x, y, *options = inputs
        save(ctx, (x, y), Options(*options))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        (x, y), options = saved(ctx)
        # torch.compile has no second derivatives, and loses track of a nested Function.
        if torch.compiler.is_compiling():
            grads = ctx.op.backward(grad_out, x, y, *options.given)
        else:
            grads = _apply_backward(ctx.op, grad_out, x, y, *options)
        return None, *grads, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, x_dot: Any, y_dot: Any, *options_dot: Any) -> Tensor:
        (x, y), options = saved(ctx)
        return ctx.op.tangent(x, y, _or_zeros(x_dot, x), _or_zeros(y_dot, y), *options.given)


class PairwiseBackward(Function):
    """``op.backward(grad_out, x, y, *options.given)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: PairwiseOp,
        grad_out: Tensor,
        x: Tensor,
        y: Tensor,
        x_labels: Tensor | None,
        y_labels: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Rows:
        return op.backward(grad_out, x, y, *Options(x_labels, y_labels, rest).given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
        ctx.op, grad_out, x, y, *options = inputs
        save(ctx, (grad_out, x, y), Options(*options))

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor, grad_grad_y: Tensor) -> tuple[Any, ...]:
        (g, x, y), options = saved(ctx)
        direction, tangent = (grad_grad_x, grad_grad_y), ctx.op.tangent
        second = hessian_vector_product(tangent, g, (x, y), direction, options)
        return None, tangent(x, y, *direction, *options.given), *second, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, g_tangent: Any, x_dot: Any, y_dot: Any, *options_dot: Any) -> Rows:
        (g, x, y), options = saved(ctx)
        # The gradient is linear in g: its derivative along g is the gradient of g's tangent.
        grads = _apply_backward(ctx.op, _or_zeros(g_tangent, g), x, y, *options)
        second = hessian_vector_product(ctx.op.tangent, g, (x, y), (x_dot, y_dot), options)
        return grads[0] + second[0], grads[1] + second[1]


# ``pairwise(op, x, y, *options)``, differentiable any number of times.
pairwise = as_function(Pairwise)

_apply_backward = as_function(PairwiseBackward)
