"""Distances between all rows of two batches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_rows
from fastmeta.ops._pairwise_autograd import PairwiseOp, Rows, pairwise
from fastmeta.ops._registration import contiguous_like, is_native, register


def distance_tangent(x: Tensor, y: Tensor, x_dot: Tensor, y_dot: Tensor, metric: str) -> Tensor:
    """Derivative [T, Q, N] of the distances along the direction x_dot, y_dot."""
    if metric == "dot":
        return -(x_dot @ y.mT) - x @ y_dot.mT
    if metric == "cosine":
        a, b, a_dot, b_dot = _normalized(x, x_dot, y, y_dot)
        return distance_tangent(a, b, a_dot, b_dot, "dot")
    # A common offset changes no distance. Without it, the sums below keep their digits.
    center, center_dot = y.mean(1, keepdim=True), y_dot.mean(1, keepdim=True)
    x, y, x_dot, y_dot = x - center, y - center, x_dot - center_dot, y_dot - center_dot
    own = (x * x_dot).sum(-1).unsqueeze(2) + (y * y_dot).sum(-1).unsqueeze(1)
    half = own - x_dot @ y.mT - x @ y_dot.mT  # half of the squared distance's tangent
    if metric == "sqeuclidean":
        return 2 * half
    distance = reference.pairwise_distance(x, y, metric)
    zero = distance == 0
    # The derivative of |z| at 0 is taken as 0. A quotient with 1 there keeps NaN out of gradients.
    return (half / torch.where(zero, 1.0, distance)).masked_fill(zero, 0.0)


def _normalized(x: Tensor, x_dot: Tensor, y: Tensor, y_dot: Tensor) -> tuple[Tensor, ...]:
    (a, a_dot), (b, b_dot) = normalized_rows(x, x_dot), normalized_rows(y, y_dot)
    return a, b, a_dot, b_dot


def normalized_rows(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Rows a = x / max(|x|, eps) and their tangent: (x_dot - a (a.x_dot)) / |x|, above eps."""
    norm = reference.safe_sqrt(x.square().sum(-1, keepdim=True))
    length = norm.clamp(min=reference.COSINE_EPS)
    a = x / length
    # Below eps the length is constant, and so has no tangent.
    along = (a * x_dot).sum(-1, keepdim=True).masked_fill(norm <= reference.COSINE_EPS, 0.0)
    return a, (x_dot - a * along) / length


register("pairwise_distance", lambda x, y, metric: x.new_empty(x.shape[0], x.shape[1], y.shape[1]))
register(
    "pairwise_distance_backward",
    lambda grad_distance, x, y, metric: (contiguous_like(x), contiguous_like(y)),
)


def _forward(x: Tensor, y: Tensor, metric: str) -> Tensor:
    return torch.ops.fastmeta.pairwise_distance(x, y, metric)


def _backward(grad_distance: Tensor, x: Tensor, y: Tensor, metric: str) -> Rows:
    return torch.ops.fastmeta.pairwise_distance_backward(grad_distance, x, y, metric)


_DISTANCE = PairwiseOp(_forward, _backward, distance_tangent)


def pairwise_distance(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """Distances between every row of ``x`` and every row of ``y``, for every task.

        sqeuclidean     sum_d (x_d - y_d)^2
        euclidean       its square root; its gradient at distance 0 is 0
        cosine          1 - x.y / (max(|x|, 1e-8) max(|y|, 1e-8))
        dot             -x.y

    Smaller is nearer, by every metric.

    The kernels sum squared differences. Large arrays use |x|^2 + |y|^2 - 2 x.y where it is as
    exact, so a distance that is small beside the norms keeps its digits. Plain PyTorch uses the
    expansion above 4 million differences, after subtracting the mean of ``y``. The op is
    differentiable any number of times, forward and reverse, and works under torch.func and
    torch.compile. bfloat16 and float16 are summed in float32. NaN and infinite inputs give NaN or
    infinite distances, in their rows only.

    Args:
        x: [T, Q, D], or [Q, D] for one task.
        y: [T, N, D], or [N, D], same dtype and device.
        metric: one of the above.

    Returns:
        [T, Q, N], or [Q, N]. Any of T, Q, N may be 0; over D = 0 features every difference is 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype.
        ValueError: shapes do not agree, devices differ, or ``metric`` is unknown.

    Source: Snell, Swersky, Zemel 2017 (arXiv 1703.05175), section 2.3.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> fm.pairwise_distance(x, y, "euclidean")
        tensor([[5.]])
    """
    check_rows("x", x, "y", y, "[T, Q, D]", "[T, N, D]")
    check_choice("metric", metric, METRICS)
    if x.dim() == 2:
        return pairwise_distance(x.unsqueeze(0), y.unsqueeze(0), metric).squeeze(0)
    if is_native("pairwise_distance", x):
        return pairwise(_DISTANCE, x, y, None, None, (metric,))
    return reference.pairwise_distance(x, y, metric)
