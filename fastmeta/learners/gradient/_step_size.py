"""The inner step size of a learner: the forms that users pass, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.step_sizes import StepSizes

StepSize = float | Tensor | Mapping[str, "float | Tensor"]


def read_step_size(lr: StepSize, layout: ParameterLayout, steps: int) -> float | Tensor:
    """A number, or a tensor of the parameters' dtype and device, checked against the layout."""
    if isinstance(lr, Mapping):
        lr = _joined(lr, layout)
    if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
        if not lr.is_floating_point():
            raise TypeError(f"lr: expected a floating-point tensor, got {lr.dtype}")
        lr = lr.to(layout.device, layout.dtype)
    if isinstance(lr, Tensor):
        _check_shape(lr, layout, steps)
    StepSizes.of(lr.unsqueeze(1) if is_per_step(lr) else lr, layout, tasks=1, steps=steps)
    if isinstance(lr, (int, float)) and not math.isfinite(lr):
        raise ValueError(f"lr: expected a finite number, got {lr}")
    return lr


def _joined(lr: Mapping[str, float | Tensor], layout: ParameterLayout) -> Tensor:
    """Join one number for each parameter name to ``[L]``."""
    if set(lr) != set(layout.names):
        raise ValueError(f"lr: expected the names {list(layout.names)}, got {list(lr)}")
    like: dict[str, Any] = {"dtype": layout.dtype, "device": layout.device}
    values = [torch.as_tensor(lr[name], **like) for name in layout.names]
    for name, value in zip(layout.names, values, strict=True):
        if value.numel() != 1:
            raise ValueError(f"lr: expected one number for {name!r}, got shape {list(value.shape)}")
    return torch.stack([value.reshape(()) for value in values])


def _check_shape(lr: Tensor, layout: ParameterLayout, steps: int) -> None:
    parameters, elements = len(layout.names), layout.numel
    has_step_rows = lr.ndim < 2 or (lr.ndim == 2 and len(lr) == steps)
    if not has_step_rows or (lr.ndim and lr.shape[-1] not in (1, parameters, elements)):
        raise ValueError(
            f"lr: expected a number or shape [], [L], [P] or, with one row a step, [K, 1], [K, L], "
            f"[K, P] with L = {parameters}, P = {elements}, K = {steps}; got {list(lr.shape)}"
        )


def is_per_step(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether a step size has a row for each inner step."""
    return isinstance(lr, Tensor) and lr.ndim == 2


def step_size_of_each_parameter(
    lr: float | Tensor, layout: ParameterLayout
) -> list[float | Tensor]:
    """The step size of each parameter: a number, ``[]``, or one an element in its shape."""
    if is_per_step(lr):
        raise ValueError(
            "lr: adapt takes one step and cannot know which; expected a number or shape [], [L] "
            f"or [P], got one row a step, {list(lr.shape)}"
        )
    if not isinstance(lr, Tensor):
        return [lr] * len(layout.names)
    sizes = StepSizes.of(lr, layout, tasks=1, steps=1).at(0)[0]
    if len(sizes) == 1:
        return [sizes.squeeze(0)] * len(layout.names)
    return list(layout.views(sizes).values())
