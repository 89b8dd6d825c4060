"""The classes of a batch of tasks: how many there are, and which ones a task has."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT

_RELABEL = ", relabel=True numbers the classes of each task from 0"


def count_classes(labels: Tensor, name: str = "support_y", advice: str = _RELABEL) -> int:
    """N, the largest label ``[T, S]`` + 1; errors call the labels ``name``.

    Raises:
        ValueError: no example is present, or no task has some class between 0 and N - 1.
    """
    found = labels.unique()
    found = found[found != ABSENT]
    if len(found) == 0:
        raise ValueError(f"num_classes: expected a number, as {name} is empty, got None")
    largest = int(found[-1])
    # Other negative labels are reported by the op that reads them.
    if int(found[0]) >= 0 and len(found) <= largest:
        first = next(n for n, label in enumerate(found.tolist()) if n != label)
        raise ValueError(
            f"{name}: expected labels 0 to N - 1 without gaps, got {len(found)} classes up to "
            f"{largest}, and none is {first}; num_classes={largest + 1} takes them as they are"
            f"{advice}"
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
