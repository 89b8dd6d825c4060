"""Losses of queries from the scores of their task's classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT, without_absent
from fastmeta.ops import reference


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy ``[T, Q]`` of logits ``[T, Q, N]``, minus infinity for a class without support.

    It is 0, with the gradient 0, for an absent query.

    Raises:
        ValueError: a label ``[T, Q]`` is neither in [0, N) nor ABSENT.
    """
    reference.check_label_range(labels, logits.shape[2], "query_y")
    # A task may have no class at all, and a softmax of nothing but minus infinities is NaN.
    logits = without_absent(logits, labels)
    return -reference.at_labels(logits.log_softmax(2), labels)


def squared_errors(scores: Tensor, labels: Tensor, present: Tensor | None) -> Tensor:
    """Mean over classes of ``(sigmoid(scores) - one-hot)^2``, ``[T, Q]``; 0 for an absent query.

    Args:
        scores: ``[T, Q, N]``.
        labels: int64 ``[T, Q]``.
        present: bool ``[T, N]``, the classes of each task that the mean is over; None: all.

    Raises:
        ValueError: a label is neither in [0, N) nor ABSENT.
    """
    classes = scores.shape[2]
    reference.check_label_range(labels, classes, "query_y")
    target = labels.unsqueeze(2) == torch.arange(classes, device=labels.device)
    error = (scores.sigmoid() - target.to(scores.dtype)).square()
    error = error.masked_fill((labels == ABSENT).unsqueeze(2), 0)
    if present is None:
        return error.mean(2)
    count = present.sum(1, keepdim=True).clamp(min=1)
    return error.masked_fill(~present.unsqueeze(1), 0).sum(2) / count.to(error.dtype)
