"""Weights of examples in learners that embed them: what is absent, and weighted means."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_dense
from fastmeta.learners._absent import present_examples
from fastmeta.ops.prototypes import prototypes


def check_weight(name: str, weight: Tensor, y: Tensor) -> None:
    """Raise unless ``weight`` is floating point ``[T, B]``, for targets y ``[T, B, ...]``."""
    check_dense(name, weight)
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weight.dtype}")
    if weight.shape != y.shape[:2]:
        raise ValueError(f"{name}: expected shape {list(y.shape[:2])}, got {list(weight.shape)}")
    if weight.device != y.device:
        raise ValueError(f"{name}: expected device {y.device}, got {weight.device}")


def without_weightless(y: Tensor, weight: Tensor | None) -> Tensor:
    """Labels ``[T, B]`` in which examples of weight 0 are absent.

    Not if the weights require a gradient: an example of weight 0 has one.
    """
    if weight is None or (weight.requires_grad and torch.is_grad_enabled()):
        return y
    return y.masked_fill(weight == 0, ABSENT)


def shares(weight: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of present examples, which sum to 1 in each task ``[T, B]``; 0 without any."""
    weight = weight.to(dtype).masked_fill(y == ABSENT, 0)
    total = weight.sum(1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)


def weighted_prototypes(x: Tensor, y: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """The weighted mean ``[T, N, D]`` of each class of x ``[T, B, D]``; 0 without any weight."""
    column = weight.to(x.dtype).unsqueeze(-1)
    # Means over the same examples: their quotient is the weighted mean.
    total = prototypes(column, y, num_classes)
    return prototypes(column * x, y, num_classes) / torch.where(total == 0, 1, total)


def seen(y: Tensor, weight: Tensor | None) -> Tensor | None:
    """The examples that a body sees, bool ``[T, B]``, of labels or targets; None: all of them."""
    labels = y if y.ndim == 2 and not y.is_floating_point() else y.new_zeros(y.shape[:2]).long()
    return present_examples(without_weightless(labels, weight))
