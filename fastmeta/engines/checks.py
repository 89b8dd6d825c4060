"""What the engines refuse: options, arenas and data that do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.derivatives import Tensors
from fastmeta.core.parameter_layout import ParameterLayout


def checked_rows(rows: Tensor, steps: int, support_x: Tensor) -> Tensor:
    """The examples that each step sees, on the device of the support."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows: expected an int64 tensor, got {got}")
    if rows.ndim != 2 or len(rows) != steps or rows.shape[1] == 0:
        raise ValueError(f"rows: expected shape [{steps}, B], a row a step, got {list(rows.shape)}")
    examples = support_x.shape[1]
    if rows.numel() and not (rows.min() >= 0 and rows.max() < examples):
        raise ValueError(f"rows: expected examples from 0 to {examples - 1}")
    return rows.to(support_x.device)


def check_arena(name: str, layout: ParameterLayout, arena: Tensor, tasks: int) -> None:
    if not isinstance(arena, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(arena).__name__}")
    if arena.shape not in ((layout.numel,), (tasks, layout.numel)):
        raise ValueError(
            f"{name}: expected shape [{layout.numel}] or [{tasks}, {layout.numel}], "
            f"got {list(arena.shape)}"
        )
    if arena.dtype != layout.dtype:
        raise TypeError(f"{name}: expected dtype {layout.dtype}, got {arena.dtype}")
    if arena.device != layout.device:
        raise ValueError(f"{name}: expected device {layout.device}, got {arena.device}")


def check_data(layout: ParameterLayout, data: Tensors) -> int:
    """The number of tasks in inputs and targets, which alternate."""
    for name, tensor in data.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim < 2 or 0 in tensor.shape[:2]:
            raise ValueError(
                f"{name}: expected shape [T, examples, ...] with at least one task and one "
                f"example, got {list(tensor.shape)}"
            )
        if tensor.device != layout.device:
            raise ValueError(f"{name}: expected device {layout.device}, got {tensor.device}")
    tasks = len(next(iter(data.values())))
    pairs = iter(data.items())
    for (x_name, x), (y_name, y) in zip(pairs, pairs, strict=True):
        for name, tensor in ((x_name, x), (y_name, y)):
            if tensor.shape[:2] != (tasks, x.shape[1]):
                raise ValueError(
                    f"{name}: expected shape [{tasks}, {x.shape[1]}, ...], got {list(tensor.shape)}"
                )
        mixed = x.is_floating_point() and x.dtype != layout.dtype
        if mixed and not torch.is_autocast_enabled(layout.device.type):
            raise TypeError(f"{x_name}: expected dtype {layout.dtype}, got {x.dtype}")
    return tasks
