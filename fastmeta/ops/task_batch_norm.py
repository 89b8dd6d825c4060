"""Batch norm with a scale and a shift of its own for every task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops import reference
from fastmeta.ops._checks import check_dims, check_floating, check_shape, check_together
from fastmeta.ops._derivatives import pullback, save, tangent
from fastmeta.ops._registration import as_function, contiguous_like, folding, is_native, register


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return torch.ops.fastmeta.task_batch_norm_backward(grad, x, weight, eps)


def _plain_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    inputs = x, weight, torch.zeros_like(weight)
    return torch.func.vjp(lambda x, w, b: reference.task_batch_norm(x, w, b, eps), *inputs)[1](grad)


def _plain_second(*inputs: Any) -> tuple[Tensor, ...]:
    *directions, grad, x, weight, eps = inputs
    back = torch.func.vjp(lambda g, x, w: _plain_gradient(g, x, w, eps), grad, x, weight)[1]
    return back(tuple(directions))


class BatchNorm(Function):
    """y of x [T, B, C, P], weight and bias [T, C]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.ops.fastmeta.task_batch_norm(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        gradient = _gradient if torch.compiler.is_compiling() else _backward
        x, weight, _ = ctx.saved_tensors
        return *gradient(grad, x, weight, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensor:
        return tangent(reference.task_batch_norm, ctx, dots)


class BatchNormBackward(Function):
    """The gradients to x, weight and bias."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return _gradient(grad, x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        return *_second(*directions, *ctx.saved_tensors, ctx.setting), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return tangent(_plain_gradient, ctx, dots)


class BatchNormSecond(Function):
    """The gradients of <BatchNormBackward, directions> to grad, x and weight."""

    @staticmethod
    def forward(
        grad_grad_x: Tensor,
        grad_grad_weight: Tensor,
        grad_grad_bias: Tensor,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmeta.task_batch_norm_backward_backward(
            grad_grad_x, grad_grad_weight, grad_grad_bias, grad, x, weight, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Any, ...]:
        return pullback(_plain_second, ctx, directions)

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        return tangent(_plain_second, ctx, dots)


_apply = as_function(BatchNorm)
_backward = as_function(BatchNormBackward)
_second = as_function(BatchNormSecond)
# PyTorch's own rules create a class at every call.
for cls, function in (
    (BatchNorm, _apply),
    (BatchNormBackward, _backward),
    (BatchNormSecond, _second),
):
    cls.vmap = staticmethod(folding(function))  # type: ignore[method-assign]


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(contiguous_like, tensors))


register("task_batch_norm", lambda x, weight, bias, eps: contiguous_like(x))
register("task_batch_norm_backward", lambda grad, x, weight, eps: _like(x, weight, weight))
register(
    "task_batch_norm_backward_backward",
    lambda v, w, b, grad, x, weight, eps: _like(x, x, weight),
)


def task_batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Batch norm of each task's images by their own statistics, with the task's scale and shift.

        y[t, b, c] = bias[t, c]
                     + weight[t, c] (x[t, b, c] - mean[t, c]) / sqrt(variance[t, c] + eps)

    with the mean and the (biased) variance of the channel in the task's batch. The same as
    ``torch.nn.functional.batch_norm`` of every task with ``training=True`` and without running
    statistics, run together. The second derivative, which meta-learning takes, is one kernel
    instead of PyTorch's chain of elementwise ones. Differentiable any number of times, forward and
    reverse; works under torch.func and torch.compile. The compiled kernels take float32 and
    float64 and sum in double on a CPU; half types are computed in plain PyTorch, in float32.

    Args:
        x: images [T, B, C, H, W], or [B, C, H, W] for one task.
        weight, bias: [T, C], or [C]; same dtype and device. None: ones, and zeros.
        eps: added to the variance, more than 0.

    Returns:
        Images in the shape of x, contiguous. T and B may be 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype.
        ValueError: shapes do not agree, devices differ, eps is not positive, or a channel has a
            single number and so no variance.

    Source: Ioffe, Szegedy 2015 (arXiv 1502.03167).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, weight = torch.randn(4, 10, 16, 8, 8), torch.full((4, 16), 2.0)
        >>> fm.task_batch_norm(x, weight).std((1, 3, 4)).round(decimals=1).unique()
        tensor([2.])
    """
    _check(x, weight, bias, eps)
    if x.dim() == 4:
        weight, bias = (None if row is None else row.unsqueeze(0) for row in (weight, bias))
        return task_batch_norm(x.unsqueeze(0), weight, bias, eps).squeeze(0)
    # The kernel always scales and shifts.
    weight = x.new_ones(x.shape[0], x.shape[2]) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias
    if not is_native("task_batch_norm", x):
        return reference.task_batch_norm(x, weight, bias, eps).contiguous()
    # A view of the images as [T, B, C, H W], or a contiguous copy of channels-last ones.
    return _apply(x.flatten(3), weight, bias, eps).view(x.shape)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_floating("x", x)
    check_dims("x", x, "[T, B, C, H, W]")
    *tasks, examples, channels, height, width = x.shape
    for name, row in (("weight", weight), ("bias", bias)):
        if row is None:
            continue
        check_floating(name, row)
        check_together(name, row, "x", x)
        check_shape(name, row, (*tasks, channels))
    if examples * height * width == 1:
        raise ValueError(f"x: expected more than one number in each channel, got {list(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps: expected more than 0, got {eps!r}")
