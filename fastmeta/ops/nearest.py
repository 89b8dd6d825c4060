"""The nearest rows of one batch to each row of another."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_choice, check_count
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_mask, check_rows
from fastmeta.ops._registration import as_function, is_native, register
from fastmeta.ops._rows_at import rows_at, sum_at
from fastmeta.ops.pairwise_distance import normalized_rows


def _fake(x: Tensor, y: Tensor, present: Tensor | None, k: int, metric: str) -> tuple[Tensor, ...]:
    shape = (x.shape[0], x.shape[1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


register("nearest", _fake)


def _pairs(x: Tensor, y: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Each query [T, Q, 1, D], and its rows [T, Q, k, D] of y, in the accumulation dtype."""
    wide = accumulation_dtype(x.dtype)
    rows = rows_at(y.to(wide), _in_a_row(indices))
    return x.to(wide).unsqueeze(2), rows.reshape(*indices.shape, x.shape[2])


def _in_a_row(pairs: Tensor) -> Tensor:
    """[T, Q, k, ...] as [T, Q k, ...]."""
    # Batched gradients have no rule for flatten().
    t, q, k, *rest = pairs.shape
    return pairs.reshape(t, q * k, *rest)


def _root_of(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Length [T, Q, k, 1] of the differences, 1 instead of 0, and where it is 0."""
    length = reference.safe_sqrt(difference.square().sum(-1, keepdim=True))
    zero = length == 0
    return torch.where(zero, 1.0, length), zero


def pair_gradient(g: Tensor, a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradient [T, Q, k, D] of sum(g * distance) to the rows a and b of each pair."""
    if metric == "dot":
        return -g * b, -g * a
    if metric == "cosine":
        # The tangent of a normalised row is a symmetric map, so it takes gradients back as well.
        of_a, of_b = normalized_rows(a, a)[0], normalized_rows(b, b)[0]
        return normalized_rows(a, -g * of_b)[1], normalized_rows(b, -g * of_a)[1]
    share = g * (a - b)
    if metric == "sqeuclidean":
        return 2 * share, -2 * share
    length, zero = _root_of(a - b)
    share = (share / length).masked_fill(zero, 0)
    return share, -share


def pair_tangent(a: Tensor, b: Tensor, a_dot: Tensor, b_dot: Tensor, metric: str) -> Tensor:
    """Derivative [T, Q, k] of the distance of each pair along the direction a_dot, b_dot."""
    if metric == "cosine":
        (a, a_dot), (b, b_dot) = normalized_rows(a, a_dot), normalized_rows(b, b_dot)
    if metric in ("cosine", "dot"):
        return -(a_dot * b + a * b_dot).sum(-1)
    along = ((a - b) * (a_dot - b_dot)).sum(-1, keepdim=True)
    if metric == "sqeuclidean":
        return 2 * along.squeeze(-1)
    length, zero = _root_of(a - b)
    return (along / length).masked_fill(zero, 0).squeeze(-1)


class Nearest(Function):
    """Distances [T, Q, k] and indices [T, Q, k]; derivatives go through the chosen pairs only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, present: Tensor | None, k: int, metric: str
    ) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", torch.ops.fastmeta.nearest(x, y, present, k, metric))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, y, _, _, ctx.metric = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, y, output[1])
        ctx.save_for_forward(x, y, output[1])

    @staticmethod
    def backward(ctx: Any, grad_distances: Tensor, _: Any) -> tuple[Any, ...]:
        x, y, indices = ctx.saved_tensors
        a, b = _pairs(x, y, indices)
        g = grad_distances.to(a.dtype).masked_fill(indices == ABSENT, 0).unsqueeze(3)
        grad_a, grad_b = pair_gradient(g, a, b, ctx.metric)
        grad_y = sum_at(_in_a_row(grad_b), _in_a_row(indices), y.shape[1])
        return grad_a.sum(2).to(x.dtype), grad_y.to(y.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Any, y_dot: Any, *_: Any) -> tuple[Any, ...]:
        x, y, indices = ctx.saved_tensors
        a, b = _pairs(x, y, indices)
        x_dot = torch.zeros_like(x) if x_dot is None else x_dot
        y_dot = torch.zeros_like(y) if y_dot is None else y_dot
        tangent = pair_tangent(a, b, *_pairs(x_dot, y_dot, indices), ctx.metric)
        return tangent.masked_fill(indices == ABSENT, 0).to(x.dtype), None


_nearest = as_function(Nearest)


def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    metric: str = "sqeuclidean",
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of ``y`` to every row of ``x``, for every task, nearest first.

        indices[t, q]   = the k numbers n of the smallest d(x[t, q], y[t, n])
        distances[t, q] = these d, by a metric of ``pairwise_distance``

    Equal distances keep the order of their indices, and a NaN is farther than every number, as in a
    stable sort. The kernels compare a tile of distances at a time, and no [Q, N] matrix exists:
    memory beyond inputs and outputs is O(N D) on a CPU, O(Q k) on a GPU. Plain PyTorch builds
    [T, Q, N].

    On a CPU products find candidates, for k up to 32, and sums of squared differences decide among
    all that rounding might have exchanged. So distances are exact at any offset, and neighbours are
    the same by products as by differences. On a GPU they are the nearest by the distances of
    ``pairwise_distance``.

    ``distances`` are differentiable any number of times in ``x`` and ``y``, forward and reverse,
    through the chosen pairs only: exchanges of neighbours have no derivative. The gradient takes
    memory O(Q k D). Works under torch.func and torch.compile. bfloat16 and float16 are compared in
    float32, before distances are rounded.

    Args:
        x: [T, Q, D], or [Q, D] for one task.
        y: [T, N, D], or [N, D], same dtype and device.
        k: how many, from 1 to N. The kernels are made for small numbers.
        metric: "sqeuclidean", "euclidean", "cosine" or "dot".
        present: bool [T, N], or [N]: the rows of ``y`` that a task has. The others are not read. In
            a task with fewer than k, index -1 and an infinite distance without gradient fill up.
            None: all of them.

    Returns:
        distances [T, Q, k], or [Q, k], and their indices, int64 of the same shape.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype, or ``present`` is not bool.
        ValueError: shapes or devices do not agree, ``k`` is not in 1..N, or ``metric`` is unknown.

    Source: Johnson, Douze, Jegou 2017 (arXiv 1702.08734), section 2, for exact search by tiles.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0], [7.0]])
        >>> fm.nearest(x, y)
        (tensor([[1.],
                [1.]]), tensor([[1],
                [0]]))
    """
    check_rows("x", x, "y", y, "[T, Q, D]", "[T, N, D]")
    check_choice("metric", metric, METRICS)
    k = check_count("k", k, 1)
    if k > y.shape[-2]:
        raise ValueError(f"k: expected at most {y.shape[-2]}, the rows of y, got {k}")
    if present is not None:
        check_mask("present", present, y.shape[:-1], y.device)
    if x.dim() == 2:
        mask = None if present is None else present.unsqueeze(0)
        distances, indices = nearest(x.unsqueeze(0), y.unsqueeze(0), k, metric, mask)
        return distances.squeeze(0), indices.squeeze(0)
    if is_native("nearest", x):
        return cast("tuple[Tensor, Tensor]", _nearest(x, y, present, k, metric))
    return reference.nearest(x, y, present, k, metric)
