"""Absent examples: the padding of a batch whose tasks have unequal numbers of examples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.cuda_graphs import is_being_captured

ABSENT = -1  # the label of an absent example


def is_readable(labels: Tensor) -> bool:
    """Whether the values of ``labels`` can be read: not fake, traced, vmapped or being captured."""
    real = type(labels) is Tensor and labels.device.type != "meta"
    if torch.compiler.is_compiling() or not real:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(labels)
    return not (wrapped or is_being_captured(labels))


def has_absent(labels: Tensor) -> bool:
    """Whether some of ``labels`` is ABSENT, by reading them: on CUDA this waits for the device."""
    # The least label is read first, as it takes half as long, and most batches have no padding.
    return labels.numel() > 0 and int(labels.min()) < 0 and bool((labels == ABSENT).any())


def may_have_absent(labels: Tensor) -> bool:
    """Whether some of ``labels`` may be ABSENT; True if to read them is impossible or slow."""
    return labels.device.type != "cpu" or not is_readable(labels) or has_absent(labels)


def without_absent(x: Tensor, labels: Tensor) -> Tensor:
    """x ``[T, B, D]`` with zeros for the absent of its examples, labels ``[T, B]``."""
    return x.masked_fill((labels == ABSENT).unsqueeze(-1), 0) if may_have_absent(labels) else x


def mean_factor(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """B over the number of present examples of each task ``[T, 1]``, for labels ``[T, B]``.

    It turns a mean over B examples, of which the absent ones have value 0, into a mean over the
    present ones.
    """
    present = (labels != ABSENT).sum(1, keepdim=True).clamp(min=1)
    return labels.shape[1] / present.to(dtype)


def mean_over_present(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over tasks of the mean over present examples of ``values`` ``[T, B]``, 0 at absent."""
    if may_have_absent(labels):
        values = values * mean_factor(labels, values.dtype)
    return values.mean()
