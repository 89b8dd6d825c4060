"""Classes of queries, and numbers of classes, of a batch of tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT
from fastmeta.core.classes import classes_present, count_classes

__all__ = ["check_present", "classes_present", "count_classes", "number_classes", "numbers_of"]


def check_present(query_labels: Tensor, present: Tensor) -> None:
    """ValueError for a query of a class that its task lacks; out of range is the op's to report."""
    if torch.compiler.is_compiling():
        return
    if present.shape[1]:
        known = present.gather(1, query_labels.clamp(0, present.shape[1] - 1))
        _refuse_unknown(query_labels, known | (query_labels == ABSENT))


def number_classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number the classes of each task from 0, in the order of their labels ``[T, S]``.

    Returns:
        The label of each class ``[T, N]``, -1 where a task has fewer than N; and the numbers
        ``[T, S]``, ABSENT for an absent example.

    Raises:
        ValueError: a negative label other than ABSENT.
    """
    if labels.numel() and int(labels.min()) < ABSENT:
        raise ValueError(
            f"support_y: expected labels of at least 0, or {ABSENT} for an absent example, "
            f"got {int(labels.min())}"
        )
    ordered, order = labels.sort(1)
    is_new = ordered != ABSENT
    is_new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    number = is_new.cumsum(1) - 1  # absent examples come first, and get -1
    count = int(number.max()) + 1 if labels.numel() else 0
    # They fall into one class more.
    classes = labels.new_full((len(labels), count + 1), -1)
    classes = classes.scatter(1, number.remainder(count + 1), ordered)[:, :count]
    return classes, torch.empty_like(labels).scatter(1, order, number)


def numbers_of(labels: Tensor, classes: Tensor) -> Tensor:
    """The numbers ``[T, Q]`` of labels among a task's classes ``[T, N]``; ABSENT stays.

    Raises:
        ValueError: a label that its task lacks.
    """
    absent = labels == ABSENT
    if not classes.shape[1]:
        _refuse_unknown(labels, absent)
        return labels
    matches = labels.unsqueeze(2) == classes.unsqueeze(1)
    _refuse_unknown(labels, matches.any(2) | absent)
    return matches.int().argmax(2).masked_fill(absent, ABSENT)


def _refuse_unknown(labels: Tensor, known: Tensor) -> None:
    unknown = (~known).nonzero()
    if len(unknown):
        task, query = unknown[0].tolist()
        raise ValueError(
            f"query_y[{task}, {query}] is {int(labels[task, query])}, a class without a support "
            "example in its task"
        )
