"""Checked arguments of linear heads, batched: each of them has all T tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._checks import (
    check_dims,
    check_floating,
    check_labels,
    check_shape,
    check_together,
    step_size_like,
)

LOSSES = ("cross_entropy", "mse", "logistic")


class Head(NamedTuple):
    """A linear head of every task and its examples."""

    x: Tensor  # [T, S, D]
    targets: Tensor  # [T, S], or [T, S, N]
    weight: Tensor  # [T, N, D]
    bias: Tensor | None  # [T, N]


class HeadOptions(NamedTuple):
    """Arguments of ``linear_head`` but its tensors."""

    loss: str
    weight_decay: float
    first_order: bool
    dual: bool  # whether steps are taken on coefficients of the examples


def _for_all_tasks(
    name: str, tensor: Tensor, shape: tuple[int, ...], tasks: int | None, x: Tensor
) -> Tensor:
    """``tensor`` as [T, *shape]: it has this shape, or ``shape``, which all tasks then share."""
    check_floating(name, tensor)
    check_together(name, tensor, "x", x)
    allowed = [list(shape)] if tasks is None else [list(shape), [tasks, *shape]]
    if list(tensor.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    batched = tensor.dim() > len(shape)
    return tensor if batched else tensor.expand(1 if tasks is None else tasks, *shape)


def _check_targets(targets: Tensor, x: Tensor, ways: int, loss: str) -> None:
    if loss != "mse":
        check_labels("targets", targets, x.shape[:-1], x.device)
        return
    check_floating("targets", targets)
    check_together("targets", targets, "x", x)
    check_shape("targets", targets, (*x.shape[:-1], ways))


def checked_head(
    x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, loss: str
) -> Head:
    """The head and its examples; one task gets the task dimension."""
    check_choice("loss", loss, LOSSES)
    check_floating("x", x)
    check_dims("x", x, "[T, S, D]")
    check_floating("weight", weight)
    check_dims("weight", weight, "[T, N, D]")
    ways, features = weight.shape[-2], x.shape[-1]
    if x.shape[-2] == 0 or ways == 0:
        raise ValueError(
            "x and weight: expected at least one example and one way, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if loss == "logistic" and ways != 1:
        raise ValueError(f"weight: expected one way for loss='logistic', got {list(weight.shape)}")
    tasks = x.shape[0] if x.dim() == 3 else None
    weights = _for_all_tasks("weight", weight, (ways, features), tasks, x)
    biases = None if bias is None else _for_all_tasks("bias", bias, (ways,), tasks, x)
    _check_targets(targets, x, ways, loss)
    if tasks is None:
        x, targets = x.unsqueeze(0), targets.unsqueeze(0)
    return Head(x, targets, weights, biases)


def step_sizes(lr: float | Tensor, steps: int, x: Tensor) -> Tensor:
    """``lr`` for x [T, S, D] as [T, K], in the accumulation dtype. Differentiable."""
    tasks = x.shape[0]
    if not isinstance(lr, Tensor):
        dtype = accumulation_dtype(x.dtype)
        return torch.full((1, 1), float(lr), dtype=dtype, device=x.device).expand(tasks, steps)
    lr = step_size_like(lr, x, "x")
    if list(lr.shape) not in ([], [steps], [tasks, steps]):
        raise ValueError(
            f"lr: expected a number, [K] or [T, K] with T = {tasks}, K = {steps}, "
            f"got {list(lr.shape)}"
        )
    return lr.expand(tasks, steps)
