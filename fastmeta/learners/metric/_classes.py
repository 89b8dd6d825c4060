"""The classes of a batch of tasks: how many there are, and which ones a task has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT


def count_classes(labels: Tensor) -> int:
    """N, the largest label ``[T, S]`` + 1.

    Raises:
        ValueError: no example is present, or no task has some class between 0 and N - 1.
    """
    found = labels.unique()
    found = found[found != ABSENT]
    if len(found) == 0:
        raise ValueError("num_classes: expected a number, as support_y is empty, got None")
    largest = int(found[-1])
    # Other negative labels are reported by the op that reads them.
    if int(found[0]) >= 0 and len(found) <= largest:
        first = next(n for n, label in enumerate(found.tolist()) if n != label)
        raise ValueError(
            f"support_y: expected labels 0 to N - 1 without gaps, got {len(found)} classes up to "
            f"{largest}, and none is {first}; num_classes={largest + 1} takes them as they are, "
            "relabel=True numbers the classes of each task from 0"
        )
    return largest + 1


def classes_present(
    labels: Tensor, num_classes: int, weight: Tensor | None = None
) -> Tensor | None:
    """The classes with a label ``[T, S]``, bool ``[T, N]``; None if every task has all of them.

    A class all of whose examples have weight 0 is not present.

    ``torch.compile`` knows no values, so it always gets the tensor.
    """
    if weight is not None:
        labels = labels.masked_fill(weight == 0, ABSENT)
    # One class more, of the absent examples.
    found = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    present = found.scatter(1, labels.remainder(num_classes + 1), True)[:, :num_classes]
    if torch.compiler.is_compiling() or not bool(present.all()):
        return present
    return None


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
