"""Orders in which a network sees the support of a task as a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT

_32_BITS = 0xFFFFFFFF


def random_order(labels: Tensor) -> Tensor:
    """A random permutation of the support of each task, int64 ``[T, S]``, absent examples last.

    Drawn from PyTorch's default generator.
    """
    return _sorted(torch.rand(labels.shape, device=labels.device, dtype=torch.float64), labels)


def fixed_order(labels: Tensor, number: int) -> Tensor:
    """The ``number``-th fixed permutation of the support of each task, absent examples last.

    It depends on nothing but ``number`` and the count of present examples: padding does not change
    the order of the others.
    """
    present = (labels != ABSENT).long()
    return _sorted(_hashed(present.cumsum(1) + number * 0x9E3779B1), labels)


def _sorted(keys: Tensor, labels: Tensor) -> Tensor:
    # Two sorts, of which the second is stable: the present first, in the order of their keys.
    order = keys.argsort(1)
    absent = (labels == ABSENT).gather(1, order)
    return order.gather(1, absent.long().argsort(stable=True, dim=1))


def _hashed(x: Tensor) -> Tensor:
    """Each number's hash of 32 bits (the finalizer of MurmurHash3), which maps no two to one."""
    x = x & _32_BITS
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _32_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _32_BITS
    return x ^ (x >> 16)
