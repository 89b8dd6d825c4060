"""Checks of the arguments of linear heads, which come out batched: every one with all T tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._checks import (
    check_dims,
    check_floating,
    check_labels,
    check_option,
    check_together,
)

LOSSES = ("cross_entropy", "mse", "logistic")


class Head(NamedTuple):
    x: Tensor  # [T, S, D]
    targets: Tensor  # [T, S], or [T, S, N]
    weight: Tensor  # [T, N, D]
    bias: Tensor | None  # [T, N]


def _for_all(
    name: str, tensor: Tensor, shape: tuple[int, ...], tasks: int | None, x: Tensor
) -> Tensor:
    """``tensor`` of ``shape``, one for all tasks or with the task dimension in front -> [T, *shape]."""
    check_floating(name, tensor)
    check_together(name, tensor, "x", x)
    allowed = [list(shape)] if tasks is None else [list(shape), [tasks, *shape]]
    if list(tensor.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")
    batched = tensor.dim() > len(shape)
    return tensor if batched else tensor.expand(1 if tasks is None else tasks, *shape)


def _targets(targets: Tensor, x: Tensor, ways: int, loss: str) -> Tensor:
    if loss != "mse":
        check_labels("targets", targets, x.shape[:-1], x.device)
        return targets
    check_floating("targets", targets)
    check_together("targets", targets, "x", x)
    if targets.shape != (*x.shape[:-1], ways):
        raise ValueError(
            f"targets must have shape {[*x.shape[:-1], ways]}, got {list(targets.shape)}"
        )
    return targets


def checked_head(
    x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, loss: str
) -> Head:
    """The head and its examples; one task gets the task dimension."""
    check_option("loss", loss, LOSSES)
    check_floating("x", x)
    check_dims("x", x, "[T, S, D]")
    check_floating("weight", weight)
    check_dims("weight", weight, "[T, N, D]")
    ways, features = weight.shape[-2], x.shape[-1]
    if x.shape[-2] == 0 or ways == 0:
        raise ValueError(
            "x and weight must have at least one example and one way, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if loss == "logistic" and ways != 1:
        raise ValueError(f"weight must have one way for loss='logistic', got {list(weight.shape)}")
    tasks = x.shape[0] if x.dim() == 3 else None
    weights = _for_all("weight", weight, (ways, features), tasks, x)
    biases = None if bias is None else _for_all("bias", bias, (ways,), tasks, x)
    wanted = _targets(targets, x, ways, loss)
    if tasks is None:
        x, wanted = x.unsqueeze(0), wanted.unsqueeze(0)
    return Head(x, wanted, weights, biases)


def checked_number(name: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(value)


def checked_steps(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    return steps


def step_sizes(lr: float | Tensor, steps: int, x: Tensor) -> Tensor:
    """``lr`` for x [T, S, D] as [T, K], in the accumulation dtype. Differentiable."""
    tasks, dtype = x.shape[0], accumulation_dtype(x.dtype)
    if not isinstance(lr, Tensor):
        return torch.full((1, 1), float(lr), dtype=dtype, device=x.device).expand(tasks, steps)
    check_floating("lr", lr)
    if lr.device != x.device and lr.dim():
        raise ValueError(f"lr must be on {x.device} like x, got {lr.device}")
    if list(lr.shape) not in ([], [steps], [tasks, steps]):
        raise ValueError(
            f"lr must be a number, [K] or [T, K] with T = {tasks}, K = {steps}, "
            f"got {list(lr.shape)}"
        )
    return lr.to(device=x.device, dtype=dtype).expand(tasks, steps)
