"""Losses of queries against rows, reduced, in one pass with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.absence import may_have_absent, mean_factor, mean_over_present
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._pairwise_autograd import (
    Options,
    PairwiseOp,
    hessian_vector_product,
    pairwise,
    save,
    saved,
)
from fastmeta.ops._registration import as_function

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class LossOp(PairwiseOp):
    """A loss [T, Q] of queries x [T, Q, D] against rows y [T, N, D].

    Attributes:
        gradient: (weight, x, y, *options) -> loss, and the gradient of sum(weight * loss) to x, y.
    """

    gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]


def loss_op(
    forward: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tangent: Callable[..., Tensor],
) -> LossOp:
    """The op of a loss; the gradient serves as backward as well."""
    return LossOp(forward, lambda *args: gradient(*args)[1:], tangent, gradient)


def loss_like(x: Tensor, labels: Tensor) -> Tensor:
    """An uninitialised loss of the queries x, for fakes."""
    return x.new_empty(labels.shape, dtype=accumulation_dtype(x.dtype))


class WeightedLoss(Function):
    """Each task's loss [T], the weighted sum over queries, and in the same pass its gradient.

    The gradient is a second output, so that autograd can differentiate it: its cotangents arrive in
    ``backward``, which answers them with a Hessian-vector product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: LossOp,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        x_labels: Tensor | None,
        y_labels: Tensor | None,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        loss, *gradient = op.gradient(weights, x, y, *Options(x_labels, y_labels, rest).given)
        return (weights * loss).sum(1), *gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        # None for an output that nobody differentiates tells a first derivative from a second.
        ctx.set_materialize_grads(False)
        ctx.op, x, y, weights, *options = inputs
        save(ctx, (x, y, weights, *output[1:]), Options(*options))

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *direction: Any) -> tuple[Any, ...]:
        (x, y, weights, *gradient), options = saved(ctx)
        # Two terms: the cotangent of the loss, and the cotangents of the gradient itself.
        grads = [None, None] if grad_loss is None else _scaled(grad_loss, gradient)
        if any(d is not None for d in direction):
            second = _second(ctx.op, x, y, direction, options, weights)
            grads = [b if a is None else a + b for a, b in zip(grads, second, strict=True)]
        return None, *grads, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, x_dot: Any, y_dot: Any, *rest: Any) -> tuple[Any, ...]:
        (x, y, weights, *gradient), options = saved(ctx)
        direction = (x_dot, y_dot)
        pairs = zip(gradient, direction, strict=True)
        along = [(g * d).sum((1, 2)) for g, d in pairs if d is not None]
        loss_dot = sum(along[1:], along[0]).to(accumulation_dtype(x.dtype))
        return loss_dot, *_second(ctx.op, x, y, direction, options, weights)


class WeightedLossCompiled(WeightedLoss):
    """WeightedLoss for torch.compile, which has no second derivatives and refuses a ``jvp``."""

    jvp = Function.jvp  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _op, x, y, _weights, *options = inputs
        save(ctx, (x, y, *output[1:]), Options(*options))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        (_x, _y, *gradient), _options = saved(ctx)
        return None, *_times(grad_loss, gradient), None, None, None, None


def _times(grad_loss: Tensor, gradient: list[Tensor]) -> list[Tensor]:
    return [(grad_loss[:, None, None] * g).to(g.dtype) for g in gradient]


def _scaled(grad_loss: Tensor, gradient: list[Tensor]) -> list[Tensor]:
    """``gradient`` times the cotangent ``grad_loss`` [T]; on a CPU, a cotangent of 1 costs no pass.

    The tensors returned are then the saved ones. Autograd notices and reports a change in place.
    """
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(grad_loss)
    batched = batched or functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
    readable = grad_loss.device.type == "cpu" and not (batched or torch.is_grad_enabled())
    if readable and bool((grad_loss == 1).all()):
        return gradient
    return _times(grad_loss, gradient)


def _second(
    op: LossOp,
    x: Tensor,
    y: Tensor,
    direction: tuple[Any, ...],
    options: Options,
    weights: Tensor,
) -> tuple[Any, ...]:
    """Hessian-vector product of the weighted loss."""
    return hessian_vector_product(op.tangent, weights, (x, y), direction, options)


_loss_and_gradient = as_function(WeightedLoss, compiled=WeightedLossCompiled)


def _weighted_loss(*args: Any) -> Tensor:
    return cast("Tensor", _loss_and_gradient(*args)[0])


def reduced_loss(
    op: LossOp, x: Tensor, y: Tensor, labels: Tensor, reduction: str, options: Options
) -> Tensor:
    """The loss of x against y by native kernels, reduced, in the dtype of x.

    ``labels`` [T, Q] say which queries are absent. If an input requires grad, a sum or a mean comes
    from the kernel that computes the gradient as well.
    """
    differentiated = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if reduction == "none" or not differentiated:
        return reduced(pairwise(op, x, y, *options), labels, reduction, x.dtype)
    count = labels.numel()
    # torch.compile knows no number of queries that may change, and divides afterwards.
    compiling = torch.compiler.is_compiling()
    weight = 1.0 if reduction == "sum" or compiling or count == 0 else 1 / count
    weights = torch.full_like(labels, weight, dtype=accumulation_dtype(x.dtype))
    if reduction == "mean" and may_have_absent(labels):
        weights = weights * mean_factor(labels, weights.dtype)
    total = _weighted_loss(op, x, y, weights, *options).sum()
    divide = reduction == "mean" and (compiling or count == 0)
    return (total / count if divide else total).to(x.dtype)


def reduced(loss: Tensor, labels: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """The loss [T, Q], its sum, or its mean over tasks of the mean over present queries."""
    if reduction == "mean":
        loss = mean_over_present(loss, labels)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.contiguous().to(dtype)
