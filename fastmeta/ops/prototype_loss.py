"""The loss of prototypical networks, fused with its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT, may_have_absent, without_absent
from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_labels, check_mask, check_rows
from fastmeta.ops._pairwise_autograd import Options
from fastmeta.ops._registration import contiguous_like, is_native, register
from fastmeta.ops._row_losses import REDUCTIONS, loss_like, loss_op, reduced, reduced_loss
from fastmeta.ops.pairwise_distance import distance_tangent, pairwise_distance

register(
    "prototype_loss",
    lambda query, labels, prototypes, metric, scale: loss_like(query, labels),
)
register(
    "prototype_loss_backward",
    lambda weight, query, labels, prototypes, metric, scale: (
        loss_like(query, labels),
        contiguous_like(query),
        contiguous_like(prototypes),
    ),
)


def loss_tangent(
    query: Tensor,
    prototypes: Tensor,
    query_dot: Tensor,
    prototypes_dot: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> Tensor:
    """Derivative [T, Q] of each query's loss along the direction query_dot, prototypes_dot."""
    # In the dtype of the loss, which is float32 for half types.
    wide = accumulation_dtype(query.dtype)
    x, y, x_dot, y_dot = (z.to(wide) for z in (query, prototypes, query_dot, prototypes_dot))
    # Without a direction an absent query has no derivative, and neither has its derivative.
    x, x_dot = without_absent(x, labels), without_absent(x_dot, labels)
    probability = (-scale * reference.pairwise_distance(x, y, metric)).softmax(-1)
    distance_dot = distance_tangent(x, y, x_dot, y_dot, metric)
    at_label = reference.at_labels(distance_dot, labels)
    loss_dot = scale * (at_label - (probability * distance_dot).sum(2))
    return loss_dot.masked_fill(labels == ABSENT, 0) if may_have_absent(labels) else loss_dot


def _loss(
    query: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> Tensor:
    return torch.ops.fastmeta.prototype_loss(query, labels, prototypes, metric, scale)


def _gradient(
    weight: Tensor,
    query: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-query loss, and the gradient of sum(weight * loss) to query and prototypes."""
    return torch.ops.fastmeta.prototype_loss_backward(
        weight, query, labels, prototypes, metric, scale
    )


_LOSS = loss_op(_loss, _gradient, loss_tangent)


def prototype_loss(
    query: Tensor,
    query_labels: Tensor,
    prototypes: Tensor,
    metric: str = "sqeuclidean",
    scale: float = 1.0,
    reduction: str = "mean",
    present: Tensor | None = None,
) -> Tensor:
    """Cross entropy of queries against prototypes, logits = -scale * distance.

        loss[t, q] = logsumexp_n(-scale d(t, q, n)) + scale d(t, q, query_labels[t, q])

    Fused: the native kernels compute distances, softmax, loss and (for "mean" and "sum", if an
    input requires grad) the gradient in one pass over blocks of queries. No [Q, N] matrix exists;
    memory beyond inputs and outputs is O(N D). Second and higher derivatives are exact, and do
    build [T, Q, N]. Works under torch.func and torch.compile. bfloat16 and float16 are computed in
    float32. A NaN in a query makes that query's loss NaN.

    Args:
        query: embeddings [T, Q, D], or [Q, D] for one task.
        query_labels: int64 [T, Q], or [Q], in [0, N), or -1 for an absent query, whose loss and
            gradient are 0.
        prototypes: [T, N, D], or [N, D], same dtype and device; N at least 1.
        metric: "sqeuclidean", "euclidean", "cosine" or "dot", see ``pairwise_distance``.
        scale: inverse temperature of the softmax.
        reduction: "mean" over all queries of all tasks, "sum", or "none". With absent queries
            "mean" is that over tasks of each task's mean over its present queries, 0 without one.
        present: bool [T, N], or [N]: the classes that a task has. The others have logit minus
            infinity, whatever their prototypes are, and their prototypes get no gradient. The loss
            of a query with such a label is infinite. With ``present`` the loss is composed of
            ``pairwise_distance`` and a softmax, and builds [T, Q, N]. None: all of them.

    Returns:
        A scalar, or [T, Q] ([Q]) for "none", in the dtype of ``query``. Without queries "sum" is 0
        and "mean" is NaN, as in torch.nn.functional.cross_entropy.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not agree, there is no prototype, an option is unknown, or
            a label is neither in range nor -1 (the message names the first).

    Source: Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equation 2.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> query, label = torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1])
        >>> fm.prototype_loss(query, label, torch.tensor([[0.0], [2.0]]))
        tensor(0.0181)
    """
    check_rows("query", query, "prototypes", prototypes, "[T, Q, D]", "[T, N, D]")
    check_labels("query_labels", query_labels, query.shape[:-1], query.device)
    check_choice("metric", metric, METRICS)
    check_choice("reduction", reduction, REDUCTIONS)
    if prototypes.shape[-2] == 0:
        raise ValueError("prototypes: expected at least one class, got 0")
    if present is not None:
        check_mask("present", present, prototypes.shape[:-1], query.device)
    if query.dim() == 2:
        query, query_labels, prototypes = (
            x.unsqueeze(0) for x in (query, query_labels, prototypes)
        )
        present = None if present is None else present.unsqueeze(0)
        loss = prototype_loss(query, query_labels, prototypes, metric, scale, reduction, present)
        return loss.squeeze(0) if reduction == "none" else loss
    if present is not None:
        loss = _masked_loss(query, query_labels, prototypes, metric, scale, present)
    elif is_native("prototype_loss", query):
        options = Options(query_labels, None, (metric, float(scale)))
        return reduced_loss(_LOSS, query, prototypes, query_labels, reduction, options)
    else:
        loss = reference.prototype_loss(query, query_labels, prototypes, metric, float(scale))
    return reduced(loss, query_labels, reduction, query.dtype)


def _masked_loss(
    query: Tensor, labels: Tensor, prototypes: Tensor, metric: str, scale: float, present: Tensor
) -> Tensor:
    """Loss [T, Q] with logit minus infinity for the classes that a task lacks."""
    reference.check_label_range(labels, prototypes.shape[1], "query_labels")
    query = without_absent(query, labels)
    logits = masked_logits(-scale * pairwise_distance(query, prototypes, metric), present)
    return loss_of_logits(logits, labels)


def loss_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [T, Q] of logits [T, Q, N], 0 for an absent label."""
    # A task may have no class at all, and a softmax of nothing but minus infinities is NaN.
    logits = without_absent(logits, labels)
    return -reference.at_labels(logits.log_softmax(2), labels)


def masked_logits(logits: Tensor, present: Tensor | None) -> Tensor:
    """Logits [T, Q, N], minus infinity where ``present`` [T, N] is false."""
    return logits if present is None else logits.masked_fill(~present.unsqueeze(1), -math.inf)
