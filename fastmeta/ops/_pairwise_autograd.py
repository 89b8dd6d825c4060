"""Derivatives of every order for ops of two sets of rows, out = f(x, y).

The compiled op gives f and its gradient; the rest follows from the tangent of f, written once in
plain PyTorch. With <g, f> the objective and H its Hessian in (x, y):

    jvp of f in direction v         tangent(v)
    derivative of the gradient      in g: tangent(v);  in (x, y): H v = gradient of <g, tangent(v)>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops._registration import as_function

Rows = tuple[Tensor, Tensor]


class PairwiseOptions(NamedTuple):
    """What an op takes after x and y; None where it has no such argument."""

    labels: Tensor | None
    metric: str
    scale: float | None


class PairwiseOp(NamedTuple):
    forward: Callable[..., Tensor]  # (x, y, *rest) -> out
    backward: Callable[..., Rows]  # (grad_out, x, y, *rest) -> grad_x, grad_y
    tangent: Callable[..., Tensor]  # (x, y, x_dot, y_dot, *rest) -> out_dot


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def hessian_vector_product(
    tangent: Callable[..., Tensor],
    g: Tensor,
    rows: Rows,
    direction: tuple[Tensor | None, ...],
    rest: PairwiseOptions,
) -> Rows:
    """H v of <g, f> for v = ``direction``, None meaning zero."""
    v = tuple(_or_zeros(d, r) for d, r in zip(direction, rows, strict=True))
    pullback = torch.func.vjp(lambda x, y: tangent(x, y, *v, *rest), *rows)[1]
    return pullback(g)


def save(ctx: Any, tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> None:
    labels, ctx.metric, ctx.scale = rest
    ctx.save_for_backward(*tensors, labels)
    ctx.save_for_forward(*tensors, labels)


def saved(ctx: Any) -> tuple[tuple[Tensor, ...], PairwiseOptions]:
    *tensors, labels = ctx.saved_tensors
    return tuple(tensors), PairwiseOptions(labels, ctx.metric, ctx.scale)


def differentiable(op: PairwiseOp) -> Callable[..., Tensor]:
    """``op.forward`` as a function that autograd and torch.func differentiate any number of times."""

    class Backward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(
            grad_out: Tensor,
            x: Tensor,
            y: Tensor,
            labels: Tensor | None,
            metric: str,
            scale: float | None,
        ) -> Rows:
            return op.backward(grad_out, x, y, labels, metric, scale)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
            save(ctx, inputs[:3], inputs[3:])

        @staticmethod
        def backward(ctx: Any, grad_grad_x: Tensor, grad_grad_y: Tensor) -> tuple[Any, ...]:
            (g, x, y), rest = saved(ctx)
            direction = (grad_grad_x, grad_grad_y)
            second = hessian_vector_product(op.tangent, g, (x, y), direction, rest)
            return op.tangent(x, y, *direction, *rest), *second, None, None, None

        @staticmethod
        def jvp(ctx: Any, g_dot: Any, x_dot: Any, y_dot: Any, *_: Any) -> Rows:
            (g, x, y), rest = saved(ctx)
            along_g = backward(_or_zeros(g_dot, g), x, y, *rest)
            second = hessian_vector_product(op.tangent, g, (x, y), (x_dot, y_dot), rest)
            return along_g[0] + second[0], along_g[1] + second[1]

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(
            x: Tensor,
            y: Tensor,
            labels: Tensor | None,
            metric: str,
            scale: float | None,
        ) -> Tensor:
            return op.forward(x, y, labels, metric, scale)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            save(ctx, inputs[:2], inputs[2:])

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
            (x, y), rest = saved(ctx)
            # torch.compile has no second derivatives, and loses track of a nested Function.
            gradient = op.backward if torch.compiler.is_compiling() else backward
            return *gradient(grad_out, x, y, *rest), None, None, None

        @staticmethod
        def jvp(ctx: Any, x_dot: Any, y_dot: Any, *_: Any) -> Tensor:
            (x, y), rest = saved(ctx)
            return op.tangent(x, y, _or_zeros(x_dot, x), _or_zeros(y_dot, y), *rest)

    backward = as_function(Backward)
    return as_function(Forward)
