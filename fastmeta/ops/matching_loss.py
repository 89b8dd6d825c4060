"""The loss of matching networks and of neighbourhood components analysis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT, is_readable, may_have_absent, without_absent
from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_floating, check_labels, check_rows
from fastmeta.ops._pairwise_autograd import Options
from fastmeta.ops._registration import contiguous_like, is_native, register
from fastmeta.ops._row_losses import REDUCTIONS, loss_like, loss_op, reduced, reduced_loss
from fastmeta.ops.pairwise_distance import distance_tangent

register(
    "matching_loss",
    lambda query, query_labels, support, support_labels, metric, scale, exclude_self: loss_like(
        query, query_labels
    ),
)
register(
    "matching_loss_backward",
    lambda weight, query, query_labels, support, support_labels, metric, scale, exclude_self: (
        loss_like(query, query_labels),
        contiguous_like(query),
        contiguous_like(support),
    ),
)


def loss_tangent(
    query: Tensor,
    support: Tensor,
    query_dot: Tensor,
    support_dot: Tensor,
    query_labels: Tensor,
    support_labels: Tensor,
    metric: str,
    scale: float,
    exclude_self: bool,
) -> Tensor:
    """Derivative [T, Q] of each query's loss along the direction query_dot, support_dot."""
    # In the dtype of the loss, which is float32 for half types.
    wide = accumulation_dtype(query.dtype)
    # Without a direction an absent row has no derivative, and neither has its derivative.
    x, x_dot = (without_absent(z.to(wide), query_labels) for z in (query, query_dot))
    y, y_dot = (without_absent(z.to(wide), support_labels) for z in (support, support_dot))
    logits = -scale * reference.pairwise_distance(x, y, metric)
    found = reference.matches(query_labels, support_labels, exclude_self)
    p, r = (reference.softmax_where(logits, mask) for mask in (found.any, found.same))
    distance_dot = distance_tangent(x, y, x_dot, y_dot, metric)
    loss_dot = scale * ((r - p) * distance_dot).sum(2) * found.factor.to(wide)
    absent = query_labels == ABSENT
    return loss_dot.masked_fill(absent, 0) if may_have_absent(query_labels) else loss_dot


def _loss(
    query: Tensor, support: Tensor, query_labels: Tensor, support_labels: Tensor, *rest: Any
) -> Tensor:
    return torch.ops.fastmeta.matching_loss(query, query_labels, support, support_labels, *rest)


def _gradient(
    weight: Tensor,
    query: Tensor,
    support: Tensor,
    query_labels: Tensor,
    support_labels: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-query loss, and the gradient of sum(weight * loss) to query and support."""
    return torch.ops.fastmeta.matching_loss_backward(
        weight, query, query_labels, support, support_labels, *rest
    )


_LOSS = loss_op(_loss, _gradient, loss_tangent)


def matching_loss(
    query: Tensor,
    query_labels: Tensor,
    support: Tensor,
    support_labels: Tensor,
    metric: str = "cosine",
    scale: float | Tensor = 10.0,
    reduction: str = "mean",
    exclude_self: bool = False,
) -> Tensor:
    """Minus the log-probability that a softmax over all supports gives to the query's class.

        a[t, q, s] = -scale distance(query[t, q], support[t, s])
        loss[t, q] = logsumexp_s a[t, q, s] - logsumexp_{s of q's class} a[t, q, s]

    Labels are only compared with each other, so they may be any numbers of at least 0. With one
    support a class this is ``prototype_loss``. Fused as that is: the native kernels keep no [Q, S]
    matrix, so a loss over thousands of rows takes the memory of the rows. Second and higher
    derivatives do build [T, Q, S]. Works under torch.func and torch.compile, with exact
    derivatives of every order. bfloat16 and float16 are computed in float32. A NaN in a query makes
    that query's loss NaN.

    Args:
        query: embeddings [T, Q, D], or [Q, D] for one task.
        query_labels: int64 [T, Q], or [Q], or -1 for an absent query, whose loss and gradient are
            0. The task must have a support of each label.
        support: [T, S, D], or [S, D], same dtype and device.
        support_labels: int64 [T, S], or [S], or -1 for an absent support, which no query sees.
        metric: "cosine", "sqeuclidean", "euclidean" or "dot", see ``pairwise_distance``.
        scale: inverse temperature. A tensor without dimensions gets a gradient, as
            ``log_scale.exp()`` should for a temperature that is learned; it must be above 0 for
            "sqeuclidean". With cosine and scale 1, the paper's, no query of N classes can have a
            loss below log(1 + (N - 1) / e^2), 1.27 at 20 ways and one shot.
        reduction: "mean", "sum", or "none". "mean" is over all queries of all tasks; with absent
            queries, over tasks of each task's mean over its present queries, 0 without one.
        exclude_self: do not compare query q with support q; Q and S must be the same. With
            ``matching_loss(x, y, x, y, "sqeuclidean", 1.0, exclude_self=True)`` it is the objective
            of neighbourhood components analysis. The label of a class's only example is then -1 as
            a query.

    Returns:
        A scalar, or [T, Q] ([Q]) for "none", in the dtype of ``query``. Without queries "sum" is 0
        and "mean" is NaN, as in torch.nn.functional.cross_entropy.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not agree, an option is unknown, a label is below -1, or a
            query's class has no support (the message names the first). Where labels cannot be read,
            as in a CUDA graph, the loss of such a query is infinite, and the softmax over all
            supports has the usual gradient.

    Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016 (arXiv 1606.04080), equation 1;
    Goldberger, Roweis, Hinton, Salakhutdinov 2004 (Neighbourhood Components Analysis), equation 1.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> support, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> fm.matching_loss(support[:1], labels[:1], support, labels, scale=1.0)
        tensor(0.2382)
    """
    check_rows("query", query, "support", support, "[T, Q, D]", "[T, S, D]")
    check_labels("query_labels", query_labels, query.shape[:-1], query.device)
    check_labels("support_labels", support_labels, support.shape[:-1], query.device)
    check_choice("metric", metric, METRICS)
    check_choice("reduction", reduction, REDUCTIONS)
    if exclude_self and query.shape != support.shape:
        raise ValueError(
            "exclude_self: expected as many queries as supports, got "
            f"{query.shape[-2]} and {support.shape[-2]}"
        )
    dtype = query.dtype
    if isinstance(scale, Tensor):
        query, support, metric = scaled_rows(query, support, metric, scale)
        scale = 1.0
    unbatched = query.dim() == 2
    if unbatched:
        query, query_labels, support, support_labels = (
            x.unsqueeze(0) for x in (query, query_labels, support, support_labels)
        )
    rest = (metric, float(scale), bool(exclude_self))
    if is_native("matching_loss", query):
        options = Options(query_labels, support_labels, rest)
        loss = reduced_loss(_LOSS, query, support, query_labels, reduction, options).to(dtype)
    else:
        loss = reference.matching_loss(query, query_labels, support, support_labels, *rest)
        loss = reduced(loss, query_labels, reduction, dtype)
    return loss.squeeze(0) if unbatched and reduction == "none" else loss


def check_scale(scale: Tensor, metric: str, device: torch.device) -> None:
    """Raise unless a learned ``scale`` is a number, and above 0 for the squared distance."""
    check_floating("scale", scale)
    if scale.dim():
        raise ValueError(f"scale: expected no dimensions, got shape {list(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"scale: expected device {device} like query, got {scale.device}")
    # Read on a CPU only, where it costs no wait. Elsewhere a square root shows it as NaN.
    readable = device.type == "cpu" and is_readable(scale.detach())
    if metric == "sqeuclidean" and readable and not scale > 0:
        raise ValueError(f"scale: expected above 0 for {metric}, got {float(scale)}")


def scaled_rows(
    query: Tensor, support: Tensor, metric: str, scale: Tensor
) -> tuple[Tensor, Tensor, str]:
    """Rows and a metric that give scale times the distance, but for a constant of the query.

    So derivatives of every order reach ``scale`` through the rows. They are of the accumulation
    dtype: half types would round the scaled numbers.
    """
    check_scale(scale, metric, query.device)
    wide = accumulation_dtype(query.dtype)
    query, support, scale = query.to(wide), support.to(wide), scale.to(wide)
    if metric == "sqeuclidean":
        root = scale.sqrt()
        return root * query, root * support, metric
    if metric == "euclidean":
        return scale * query, scale * support, metric
    if metric == "cosine":  # its distance is a constant more than "dot" of normalised rows
        query, support = reference.normalized(query), reference.normalized(support)
    return scale * query, support, "dot"
