"""Ridge regression in closed form, and its derivatives of every order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops._derivatives import pullback, save, tangent
from fastmeta.ops._registration import as_function, contiguous_like, folding, register
from fastmeta.ops._ridge_reference import Problem, fit


class RidgeOptions(NamedTuple):
    """Arguments of the op but its tensors."""

    bias: bool
    dual: bool  # whether the system is [S, S] instead of [D, D]


def _fake(
    x: Tensor, y: Tensor, weight: Tensor, l2: Tensor, bias: bool, dual: bool
) -> tuple[Tensor, ...]:
    tasks, examples, features = x.shape
    ways, unknowns = y.shape[2], examples if dual else features
    return (
        x.new_empty(tasks, ways, features),
        x.new_empty(tasks, ways if bias else 0),
        x.new_empty(tasks, unknowns, unknowns),
        x.new_empty(tasks, ways, examples if dual else 0),
    )


def _fake_backward(
    grad_head: Tensor, grad_intercept: Tensor, x: Tensor, y: Tensor, weight: Tensor, l2: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(map(contiguous_like, (x, y, weight, l2)))


register("ridge_head", _fake)
register("ridge_head_backward", _fake_backward)


def plain_ridge(
    x: Tensor, y: Tensor, weight: Tensor, l2: Tensor, options: RidgeOptions
) -> tuple[Tensor, Tensor]:
    """The head in plain PyTorch; [T, 0] stands for no intercept."""
    problem = Problem(x, y, l2[:, None, None], weight.unsqueeze(2), None, options.bias)
    found = fit(problem, options.dual, loo=False)
    return found.weight, x.new_zeros(len(x), 0) if found.bias is None else found.bias


def _plain_gradient(
    grad_head: Tensor,
    grad_intercept: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    l2: Tensor,
    options: RidgeOptions,
) -> tuple[Tensor, ...]:
    inputs = x, y, weight, l2
    back = torch.func.vjp(lambda a, b, c, d: plain_ridge(a, b, c, d, options), *inputs)[1]
    return back((grad_head, grad_intercept))


class Ridge(Function):
    """Head [T, N, D], intercept [T, N] (or [T, 0]), and what the backward pass reads."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, weight: Tensor, l2: Tensor, options: RidgeOptions
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.ridge_head(x, y, weight, l2, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        head, _, factor, coefficients = output
        ctx.mark_non_differentiable(factor, coefficients)
        *tensors, ctx.setting = inputs
        ctx.save_for_backward(*tensors, head, factor, coefficients)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_head: Tensor, grad_intercept: Tensor, *_: Any) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        gradient = _raw_backward if torch.compiler.is_compiling() else _backward
        return *gradient(grad_head, grad_intercept, *ctx.saved_tensors, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return *tangent(plain_ridge, ctx, dots), None, None


class RidgeBackward(Function):
    """The gradients to x, y, weight and l2."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _raw_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *upstream_and_inputs, _head, _factor, _coefficients, options = inputs
        save(ctx, (*upstream_and_inputs, options))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        # The head, its factor and its coefficients follow from the inputs, which get all of it.
        *gradients, _ = pullback(_plain_gradient, ctx, directions)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return tangent(_plain_gradient, ctx, dots[:6])


def _raw_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, options = inputs
    return torch.ops.fastmeta.ridge_head_backward(*tensors, *options)


ridge = as_function(Ridge)
_backward = as_function(RidgeBackward)
# PyTorch's own rules create a class at every call.
for cls, function in ((Ridge, ridge), (RidgeBackward, _backward)):
    cls.vmap = staticmethod(folding(function))  # type: ignore[method-assign]
