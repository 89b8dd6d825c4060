"""Pooled sums of all pairs of feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.checks import check_integer
from fastmeta.ops import reference
from fastmeta.ops._checks import check_dims, check_floating, check_together
from fastmeta.ops._derivatives import filled
from fastmeta.ops._registration import as_function, folding, is_native, register

MOST = 15  # a place in a window of 15 x 15 is a byte, and one is left for "none"

Size = tuple[int, int]  # height and width of the maps


def _gradient(grad: Tensor, place: Tensor, size: Size, pool: int) -> tuple[Tensor, Tensor]:
    return torch.ops.fastmeta.pair_pool_backward(grad, place, size, pool)


class Pool(Function):
    """Pooled pairs [T, Q, N, C, H', W'] of x [T, Q, C, H, W] and y [T, N, C, H, W], and places."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, pool: int) -> tuple[Tensor, Tensor]:
        return torch.ops.fastmeta.pair_pool(x, y, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, ctx.pool = inputs
        _keep(ctx, output[1], (x.shape[3], x.shape[4]))
        ctx.save_for_forward(output[1], *inputs[:2])  # whose tangents may be missing
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        gradient = _gradient if torch.compiler.is_compiling() else _scatter
        (place,) = ctx.saved_tensors
        return *gradient(grad, place, ctx.size, ctx.pool), None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> tuple[Any, ...]:
        place, *maps = ctx.saved_tensors
        return _gather(*filled(dots, tuple(maps)), place, ctx.pool), None


class Scatter(Function):
    """The gradients to x and y: ``grad`` at its places."""

    @staticmethod
    def forward(grad: Tensor, place: Tensor, size: Size, pool: int) -> tuple[Tensor, Tensor]:
        return _gradient(grad, place, size, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, place, size, ctx.pool = inputs
        _keep(ctx, place, size)

    @staticmethod
    def backward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return _gather(x, y, *ctx.saved_tensors, ctx.pool), None, None, None

    @staticmethod
    def jvp(ctx: Any, grad_dot: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _scatter(grad_dot, *ctx.saved_tensors, ctx.size, ctx.pool)


class Gather(Function):
    """The sums of x and y at the places: the transpose of ``Scatter``."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, place: Tensor, pool: int) -> Tensor:
        return torch.ops.fastmeta.pair_pool_gather(x, y, place, pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, place, ctx.pool = inputs
        _keep(ctx, place, (x.shape[3], x.shape[4]))
        ctx.save_for_forward(place, x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_scatter(grad, *ctx.saved_tensors, ctx.size, ctx.pool), None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Tensor:
        place, *maps = ctx.saved_tensors
        return _gather(*filled(dots, tuple(maps)), place, ctx.pool)


def _keep(ctx: Any, place: Tensor, size: Size) -> None:
    ctx.size = tuple(size)
    ctx.save_for_backward(place)
    ctx.save_for_forward(place)


_apply = as_function(Pool)
_scatter = as_function(Scatter)
_gather = as_function(Gather)
# PyTorch's own rules create a class at every call.
for cls, function in ((Pool, _apply), (Scatter, _scatter), (Gather, _gather)):
    cls.vmap = staticmethod(folding(function))  # type: ignore[method-assign]


def _pooled_like(x: Tensor, y: Tensor, pool: int) -> Tensor:
    tasks, queries, channels, height, width = x.shape
    return x.new_empty(tasks, queries, y.shape[1], channels, height // pool, width // pool)


def _fake(x: Tensor, y: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    pooled = _pooled_like(x, y, pool)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


def _fake_backward(grad: Tensor, place: Tensor, size: Size, pool: int) -> tuple[Tensor, Tensor]:
    tasks, queries, classes, channels = grad.shape[:4]
    x, y = (grad.new_empty(tasks, n, channels, *size) for n in (queries, classes))
    return x, y


register("pair_pool", _fake)
register("pair_pool_backward", _fake_backward)
register("pair_pool_gather", lambda x, y, place, pool: _pooled_like(x, y, pool))


def pair_pool(x: Tensor, y: Tensor, pool: int = 2) -> Tensor:
    """Maximum over windows of relu(x + y), for every map of ``x`` with every map of ``y``.

        out[q, n] = max_pool2d(relu(x[q] + y[n]), pool)

    The rest of a convolution block on cat(x, y), the first one of a relation network: the
    convolution of a concatenation is the sum of two, and a batch norm folds into both halves. So
    they need Q + N maps, and only this op sees all Q N pairs.

    As in PyTorch the first maximum of a window, row by row, takes its gradient, relu has the
    gradient 0 at 0, and rows and columns that fill no window are cut. Differentiable any number of
    times, forward and reverse; works under torch.func and torch.compile. bfloat16 and float16 are
    computed in float32.

    Args:
        x: maps [T, Q, C, H, W], or [Q, C, H, W] for one task.
        y: maps [T, N, C, H, W], or [N, C, H, W], same dtype and device.
        pool: height and width of a window and its step, from 1 to 15.

    Returns:
        [T, Q, N, C, H // pool, W // pool], or without T; contiguous. T, Q, N and C may be 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype; ``pool`` is no integer.
        ValueError: shapes do not agree, devices differ, ``pool`` is out of range, or a map is
            smaller than a window.

    Source: Sung et al. 2018 (arXiv 1711.06025).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x = torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]])
        >>> y = torch.tensor([[[[0.0, 0.0], [5.0, 0.0]]], [[[-4.0, -4.0], [-4.0, -4.0]]]])
        >>> fm.pair_pool(x, y).flatten()
        tensor([7., 0.])
    """
    _check(x, y, pool)
    if x.dim() == 4:
        return pair_pool(x.unsqueeze(0), y.unsqueeze(0), pool).squeeze(0)
    if not is_native("pair_pool", x):
        return reference.pair_pool(x, y, pool).contiguous()
    return _apply(x, y, pool)[0]


def _check(x: Tensor, y: Tensor, pool: int) -> None:
    for name, maps, shape in (("x", x, "[T, Q, C, H, W]"), ("y", y, "[T, N, C, H, W]")):
        check_floating(name, maps)
        check_dims(name, maps, shape)
    check_together("y", y, "x", x)
    if x.dim() != y.dim() or x.shape[:-4] != y.shape[:-4] or x.shape[-3:] != y.shape[-3:]:
        raise ValueError(
            "x [T, Q, C, H, W] and y [T, N, C, H, W]: expected the same T, C, H and W, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    check_integer("pool", pool, 1)
    if pool > MOST:
        raise ValueError(f"pool: expected at most {MOST}, got {pool}")
    if pool > min(x.shape[-2:]):
        raise ValueError(
            f"pool: expected at most the maps' height and width, got {pool} "
            f"for maps {list(x.shape[-2:])}"
        )
