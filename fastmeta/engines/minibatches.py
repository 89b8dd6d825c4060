"""Another batch of the support at each inner step, as users write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.core.checks import check_dense
from fastmeta.core.trees import check_tree, first_tensor
from fastmeta.engines.base import Examples, Minibatches

PER_STEP = "per_step"


def read_minibatches(inner_batches: Any, steps: int, support: Examples) -> Minibatches | None:
    """Read ``inner_batches`` as users write it, see ``fastmeta.MAML.meta_loss``; None for None.

    Raises:
        TypeError: neither int64 indices nor a string.
        ValueError: another string, no steps, a support or indices of another shape, or indices
            out of range.
    """
    if inner_batches is None:
        return None
    if steps == 0:
        raise ValueError("inner_batches: expected None, as there are no steps")
    check_tree(support.x_name, support.x)
    check_tree(support.y_name, support.y)
    for name, tensor in support.named().items():
        check_dense(name, tensor)
    if isinstance(inner_batches, str):
        _check_per_step(inner_batches, steps, support)
        return Minibatches()
    indices = _checked_indices(inner_batches, steps, support)
    leading = first_tensor(support.x).shape[:2]
    for name, tensor in support.named().items():
        if tensor.shape[:2] != leading:
            expected = ", ".join(map(str, leading))
            raise ValueError(f"{name}: expected shape [{expected}, ...], got {list(tensor.shape)}")
    return Minibatches(indices)


def seen_first(support: Examples, batches: Minibatches | None) -> Examples:
    """What the first step sees of the support; its shapes are the shapes that every step sees."""
    return support if batches is None else batches.at(0, support)


def _check_per_step(inner_batches: str, steps: int, support: Examples) -> None:
    if inner_batches != PER_STEP:
        raise ValueError(f"inner_batches: expected indices or {PER_STEP!r}, got {inner_batches!r}")
    x = first_tensor(support.x)
    expected = list(x.shape[:3]) if x.ndim > 2 else ["T", steps, "B"]
    for name, tensor in support.named().items():
        fits = tensor.ndim > 2 and tensor.shape[1] == steps and 0 not in tensor.shape[:3]
        if not (fits and tensor.shape[:3] == x.shape[:3]):
            shown = ", ".join(map(str, [expected[0], steps, *expected[2:]]))
            raise ValueError(
                f"{name}: expected shape [{shown}, ...], a batch for each of {steps} steps "
                f"(inner_batches={PER_STEP!r}), got {list(tensor.shape)}"
            )


def _checked_indices(indices: Any, steps: int, support: Examples) -> Tensor:
    """The indices on the device of the support."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"inner_batches: expected an int64 tensor or {PER_STEP!r}, got {got}")
    check_dense("inner_batches", indices)
    x = first_tensor(support.x)
    tasks, examples = x.shape[:2] if x.ndim > 1 else (0, 0)
    leading = {2: (steps,), 3: (tasks, steps)}.get(indices.ndim)
    if leading is None or indices.shape[:-1] != leading or indices.shape[-1] == 0:
        raise ValueError(
            f"inner_batches: expected shape [K, B] or [T, K, B] with T = {tasks}, K = {steps} and "
            f"at least one example, got {list(indices.shape)}"
        )
    # Both numbers in one transfer from the device.
    low, high = torch.stack(indices.aminmax()).tolist() if indices.numel() else (0, -1)
    if low < 0 or high >= examples:
        raise ValueError(
            f"inner_batches: expected examples from 0 to {examples - 1}, got {low} to {high}"
        )
    return indices.to(x.device)
