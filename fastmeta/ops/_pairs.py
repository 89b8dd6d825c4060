"""Derivatives of every order for ops of two sets of rows, out = f(x, y).

The compiled op gives f and its gradient; the rest follows from the tangent of f, written once in
plain PyTorch. With <g, f> the objective and H its Hessian in (x, y):

    jvp of f in direction v             tangent(v)
    derivative of the gradient          in g: tangent(v);  in (x, y): H v = gradient of <g, tangent(v)>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from fastmeta.ops._raw import callable_of

Rows = tuple[torch.Tensor, torch.Tensor]


class PairOp(NamedTuple):
    """`rest` is what an op takes after x and y: at most one tensor (labels), then options."""

    forward: Callable[..., torch.Tensor]  # (x, y, *rest) -> out
    backward: Callable[..., Rows]  # (grad_out, x, y, *rest) -> grad_x, grad_y
    tangent: Callable[..., torch.Tensor]  # (x, y, x_dot, y_dot, *rest) -> out_dot


def _or_zeros(tangent: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def hessian_vector_product(
    tangent: Callable[..., torch.Tensor], g: torch.Tensor, rows: Rows, direction: Rows, rest: tuple
) -> Rows:
    """H v of <g, f> for v = `direction`."""
    _, pullback = torch.func.vjp(lambda x, y: tangent(x, y, *direction, *rest), *rows)
    return pullback(g)


def save(ctx: Any, tensors: tuple[torch.Tensor, ...], rest: tuple) -> None:
    labels = tuple(r for r in rest if isinstance(r, torch.Tensor))
    ctx.options = rest[len(labels) :]
    ctx.num_labels = len(labels)
    ctx.save_for_backward(*tensors, *labels)
    ctx.save_for_forward(*tensors, *labels)


def saved(ctx: Any) -> tuple[tuple[torch.Tensor, ...], tuple]:
    split = len(ctx.saved_tensors) - ctx.num_labels
    return ctx.saved_tensors[:split], (*ctx.saved_tensors[split:], *ctx.options)


def differentiable(op: PairOp) -> Callable[..., torch.Tensor]:
    """`op.forward` as a function that autograd and torch.func differentiate any number of times."""

    class Backward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(grad_out: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *rest: Any) -> Rows:
            return op.backward(grad_out, x, y, *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Rows) -> None:
            save(ctx, inputs[:3], inputs[3:])

        @staticmethod
        def backward(ctx: Any, grad_grad_x: torch.Tensor, grad_grad_y: torch.Tensor) -> tuple:
            (g, *rows), rest = saved(ctx)
            direction = (grad_grad_x, grad_grad_y)
            second = hessian_vector_product(op.tangent, g, tuple(rows), direction, rest)
            return op.tangent(*rows, *direction, *rest), *second, *(None for _ in rest)

        @staticmethod
        def jvp(ctx: Any, g_dot: Any, x_dot: Any, y_dot: Any, *_: Any) -> Rows:
            (g, x, y), rest = saved(ctx)
            direction = (_or_zeros(x_dot, x), _or_zeros(y_dot, y))
            along_g = backward(_or_zeros(g_dot, g), x, y, *rest)
            second = hessian_vector_product(op.tangent, g, (x, y), direction, rest)
            return along_g[0] + second[0], along_g[1] + second[1]

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
            return op.forward(x, y, *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
            save(ctx, inputs[:2], inputs[2:])

        @staticmethod
        def backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
            (x, y), rest = saved(ctx)
            return *backward(grad_out, x, y, *rest), *(None for _ in rest)

        @staticmethod
        def jvp(ctx: Any, x_dot: Any, y_dot: Any, *_: Any) -> torch.Tensor:
            (x, y), rest = saved(ctx)
            return op.tangent(x, y, _or_zeros(x_dot, x), _or_zeros(y_dot, y), *rest)

    backward = callable_of(Backward)
    return callable_of(Forward)
