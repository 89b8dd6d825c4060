"""Scores of a query's pairs with the support, reduced to one score a class."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT

REDUCTIONS = ("max", "mean", "logsumexp")


def class_scores(
    scores: Tensor, labels: Tensor, num_classes: int, reduce: str, weight: Tensor | None = None
) -> Tensor:
    """Scores ``[T, Q, N]`` of classes from those ``[T, Q, S]`` of their support examples.

    A class without a support example has minus infinity. Differentiable; at ties of the largest the
    gradient is shared.

    Args:
        scores: ``[T, Q, S]``.
        labels: int64 ``[T, S]``, in [0, N), or ABSENT.
        num_classes: N.
        reduce: "max", "mean" or "logsumexp" over the examples of a class.
        weight: ``[T, S]``, of at least 0: an example counts as so many in "mean" and "logsumexp".
            None: all are 1.
    """
    # One class more, of the absent examples.
    classes = labels.masked_fill(labels == ABSENT, num_classes)
    index = classes.unsqueeze(1).expand_as(scores)
    shape = (*scores.shape[:2], num_classes + 1)
    nothing = scores.new_full(shape, -torch.inf)
    if reduce == "max":
        if weight is not None:
            scores = scores.masked_fill((weight == 0).unsqueeze(1), -torch.inf)
        return nothing.scatter_reduce(2, index, scores, "amax")[..., :num_classes]
    each = torch.ones_like(labels, dtype=scores.dtype) if weight is None else weight.to(scores)
    each = each.unsqueeze(1).expand_as(scores)
    zeros = scores.new_zeros(shape)
    count = zeros.scatter_add(2, index, each)
    empty = count == 0
    if reduce == "mean":
        found = zeros.scatter_add(2, index, each * scores) / torch.where(empty, 1, count)
    else:
        # From the largest, so that no exponential overflows.
        top = nothing.scatter_reduce(2, index, scores.detach(), "amax").masked_fill(empty, 0)
        terms = each * (scores - top.gather(2, index)).exp()
        found = torch.where(empty, 1, zeros.scatter_add(2, index, terms)).log() + top
    return found.masked_fill(empty, -torch.inf)[..., :num_classes]
