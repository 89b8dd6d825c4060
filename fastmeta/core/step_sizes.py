"""Step sizes of an inner loop in the one form that both engines take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.core.parameter_layout import ParameterLayout


@dataclass(frozen=True)
class StepSizes:
    """Step sizes of K steps, T tasks and P parameters; a dimension of 1 serves all.

    Attributes:
        values: ``[K or 1, T or 1, P or 1]``.

    Example:
        >>> import torch
        >>> layout = ParameterLayout.of(torch.nn.Linear(3, 2))
        >>> StepSizes.of(0.1, layout, tasks=4, steps=5).values.shape
        torch.Size([1, 1, 1])
        >>> StepSizes.of(torch.rand(5, 1, 2), layout, tasks=4, steps=5).at(3).shape
        torch.Size([1, 8])
    """

    values: Tensor

    @classmethod
    def of(cls, lr: float | Tensor, layout: ParameterLayout, tasks: int, steps: int) -> StepSizes:
        """Read a step size as users write it.

        Args:
            lr: a number; a tensor ``[]`` or ``[1]``; one number a parameter ``[L]``; one an element
                ``[P]``; one row a task ``[T, 1]``, ``[T, L]`` or ``[T, P]``; or one matrix a step,
                ``[K, T, P]`` where each of the three may be 1 and the last may be L.
            layout: the parameters.
            tasks: T.
            steps: K.

        Returns:
            Step sizes differentiable in ``lr``. A number comes in the precision of the updates
            (float32 for half precision), a tensor in its own. If L equals P, every parameter has
            one element, and both readings agree.

        Raises:
            TypeError: ``lr`` is no number or tensor, or its dtype is not the parameters'.
            ValueError: it has another shape, or lies on another device.
        """
        if isinstance(lr, (int, float)) and not isinstance(lr, bool):
            dtype = accumulation_dtype(layout.dtype)
            return cls(torch.full((1, 1, 1), float(lr), dtype=dtype, device=layout.device))
        if not isinstance(lr, Tensor):
            raise TypeError(f"lr: expected a number or a tensor, got {type(lr).__name__}")
        if lr.dtype != layout.dtype:
            raise TypeError(f"lr: expected dtype {layout.dtype}, got {lr.dtype}")
        if lr.device != layout.device:
            raise ValueError(f"lr: expected device {layout.device}, got {lr.device}")
        if lr.ndim <= 1 and lr.numel() == 1:
            return cls(lr.reshape(1, 1, 1))
        _check_shape(lr, layout, tasks, steps)
        values = lr.reshape((1,) * (3 - lr.ndim) + lr.shape)
        per_element = lr.shape[-1] in (1, layout.numel)
        return cls(values if per_element else _repeat_over_elements(values, layout))

    def row(self, k: int) -> int:
        """The row of step k: its own, or the one that all steps share."""
        return k % len(self.values)

    def at(self, k: int) -> Tensor:
        """The step sizes of step k ``[T or 1, P or 1]``."""
        return self.values[self.row(k)]

    def of_tasks(self, tasks: slice) -> StepSizes:
        """The step sizes of some tasks; those that all tasks share stay whole."""
        return self if self.values.shape[1] == 1 else StepSizes(self.values[:, tasks])


def _check_shape(lr: Tensor, layout: ParameterLayout, tasks: int, steps: int) -> None:
    parameters, elements = len(layout.names), layout.numel
    per_step = [(k, t) for k in (1, steps) for t in (1, tasks)]
    of_dims: dict[int, Sequence[tuple[int, ...]]] = {1: [()], 2: [(tasks,)], 3: per_step}
    leads = of_dims.get(lr.ndim, [])
    if lr.shape[:-1] not in leads or lr.shape[-1] not in (1, parameters, elements):
        raise ValueError(
            f"lr: expected a number or shape [], [L], [P], [T, 1], [T, L], [T, P] or, with one "
            f"matrix a step, [K, 1 or T, 1 or L or P] with L = {parameters}, P = {elements}, "
            f"T = {tasks}, K = {steps}; got {list(lr.shape)}"
        )


def _repeat_over_elements(values: Tensor, layout: ParameterLayout) -> Tensor:
    """One number a parameter ``[..., L]`` -> one an element ``[..., P]``."""
    lead, columns = values.shape[:-1], values.split(1, dim=-1)
    pieces = [c.expand(*lead, size) for c, size in zip(columns, layout.sizes, strict=True)]
    return torch.cat(pieces, dim=-1)


def check_step_size(lr: float | Tensor, steps: int) -> None:
    """TypeError or ValueError unless lr is a finite number, or a tensor ``[]`` or ``[K]``."""
    expected = f"lr: expected a finite number or a tensor [] or [K] with K = {steps}"
    if isinstance(lr, Tensor):
        if not lr.is_floating_point():
            raise TypeError(f"lr: expected a floating-point tensor, got {lr.dtype}")
        if lr.shape not in ((), (steps,)):
            raise ValueError(f"{expected}, got {list(lr.shape)}")
    elif not isinstance(lr, (int, float)) or isinstance(lr, bool):
        raise TypeError(f"{expected}, got {type(lr).__name__}")
    elif not math.isfinite(lr):
        raise ValueError(f"{expected}, got {lr}")
