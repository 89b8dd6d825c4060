"""Modules on the present examples of padded batches, so that no statistic sees the padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT, has_absent, is_readable


def present_examples(labels: Tensor) -> Tensor | None:
    """Which examples are present, bool ``[T, B]``; None if all are, or if labels are unreadable."""
    if not is_readable(labels) or not has_absent(labels):
        return None
    return labels != ABSENT


def on_present(module: Callable[[Tensor], Tensor], x: Tensor, present: Tensor) -> Tensor | None:
    """Features ``[T, B, D]`` of one call on the present of x ``[T, B, ...]``, 0 for the others.

    ``module`` maps ``[n, ...]`` to ``[n, D]``. None if no example is present.
    """
    places = present.flatten().nonzero().squeeze(1)
    if not len(places):
        return None
    return _scattered(module(x.flatten(0, 1)[places]), places, present)


def on_present_of_tasks(
    module: Callable[[Tensor], Tensor], x: Tensor, present: Tensor
) -> Tensor | None:
    """Same as ``on_present``, for a module of tasks ``[t, b, ...]`` -> ``[t, b, D]``.

    Tasks with equally many examples are taken together, and the module sees no padding.
    """
    counts = present.sum(1)
    index = torch.arange(present.numel(), device=x.device).view_as(present)
    rows, places = [], []
    for count in counts.unique().tolist():
        if count == 0:
            continue
        tasks = (counts == count).nonzero().squeeze(1)
        places.append(index[tasks][present[tasks]])
        examples = x.flatten(0, 1)[places[-1]].unflatten(0, (len(tasks), count))
        rows.append(module(examples).flatten(0, 1))
    return _scattered(torch.cat(rows), torch.cat(places), present) if rows else None


def _scattered(rows: Tensor, places: Tensor, present: Tensor) -> Tensor:
    """Rows ``[n, D]`` at their places among all examples, zeros elsewhere: ``[T, B, D]``."""
    zeros = rows.new_zeros(present.numel(), *rows.shape[1:])
    return zeros.index_copy(0, places, rows).unflatten(0, present.shape)
