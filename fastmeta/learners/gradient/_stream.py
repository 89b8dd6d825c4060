"""Steps on a stream of examples, with reads between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmeta.core.checks import check_choice, is_number
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.step_sizes import StepSizes
from fastmeta.engines.base import Examples
from fastmeta.engines.task_gradient import TaskGradient

READS = ("before", "after")
STREAM_MEMORY = ("keep", "segments")

# Of parameters and examples; and whether the losses will be differentiated.
GradientAt = Callable[[Tensor, Examples, bool], TaskGradient]


@dataclass(frozen=True)
class Chunks:
    """Examples of C steps of T tasks.

    Attributes:
        x, y: ``[T, C, B, ...]``.
        role: as in ``Examples``.
        weight: ``[T, C, B]`` or None.
    """

    x: Tensor
    y: Tensor
    role: str
    weight: Tensor | None = None
    _steps: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name = self.role or "x"
        for which, tensor in (("x", self.x), ("y", self.y)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor {which}, got {type(tensor).__name__}")
            if tensor.ndim < 3 or tensor.shape[:3] != self.x.shape[:3]:
                raise ValueError(
                    f"{name}: expected {which} [T, C, B, ...], the same T, C and B in x and y, got "
                    f"{list(self.x.shape)} and {list(self.y.shape)}"
                )
        if self.weight is not None and self.weight.shape != self.x.shape[:3]:
            raise ValueError(
                f"weight: expected shape {list(self.x.shape[:3])}, got {list(self.weight.shape)}"
            )

        # Once: the backward of each x[:, c] by itself would fill a gradient of all steps.
        tensors = (None if t is None else t.unbind(1) for t in (self.x, self.y, self.weight))
        object.__setattr__(self, "_steps", tuple(tensors))

    def at(self, c: int) -> Examples:
        """The examples of a step."""
        x, y, weight = self._steps
        return Examples(x[c], y[c], self.role, None if weight is None else weight[c])


@dataclass(frozen=True)
class Stream:
    """The steps ``m <- beta_c m + g_c``, ``theta <- (1 - a_c) theta - lr_c m``, and the reads.

    Attributes:
        written, read: the examples of the steps, and of the reads.
        reads_after: whether a step's read comes after it.
        step_sizes: of each step.
        momentum, decay: of each step ``[C, T or 1, P or 1]``; None: 0.
        step_gradient, read_losses: gradients for the steps; losses of the reads.
        first_order: whether the gradients have no derivative.
    """

    written: Chunks
    read: Chunks
    reads_after: bool
    step_sizes: StepSizes
    momentum: Tensor | None
    decay: Tensor | None
    step_gradient: GradientAt
    read_losses: GradientAt
    first_order: bool

    def run(self, theta: Tensor, memory: str) -> tuple[Tensor, Tensor, Tensor]:
        """The reads' losses ``[T, C]``, their outputs ``[T, C, Q, ...]``, and the last theta."""
        state: tuple[Tensor, ...] = theta, torch.zeros_like(theta)
        count = self.written.x.shape[1]
        size = count if memory == "keep" else math.ceil(math.sqrt(count))
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        for first in range(0, count, size):
            steps = range(first, min(count, first + size))
            found = self._segment(steps, *state) if memory == "keep" else self._again(steps, *state)
            state = found[:2]
            losses.append(found[2])
            outputs.append(found[3])
        return torch.cat(losses, 1), torch.cat(outputs, 1), state[0]

    def _again(self, steps: range, *state: Tensor) -> tuple[Tensor, ...]:
        """A segment that keeps its start only, and runs again in the backward."""
        found: tuple[Tensor, ...] = checkpoint(self._segment, steps, *state, use_reentrant=False)
        return found

    def _segment(self, steps: range, theta: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        losses: list[Tensor] = []
        outputs: list[Tensor] = []

        def look(found: TaskGradient) -> None:
            losses.append(found.losses)
            outputs.append(found.outputs)

        same = self.read is self.written and self.step_gradient is self.read_losses
        for c in steps:
            reads_here = same and not self.reads_after
            found = self.step_gradient(theta, self.written.at(c), reads_here)
            if not self.reads_after:
                look(found if same else self.read_losses(theta, self.read.at(c), True))
            grads = found.grads.detach() if self.first_order else found.grads
            m = grads if self.momentum is None else self.momentum[c] * m + grads
            left = theta if self.decay is None else (1 - self.decay[c]) * theta
            theta = left - self.step_sizes.at(c) * m
            if self.reads_after:
                look(self.read_losses(theta, self.read.at(c), True))
        return theta, m, torch.stack(losses, 1), torch.stack(outputs, 1)


def of_each_step(
    name: str, value: float | Tensor, layout: ParameterLayout, tasks: int, count: int
) -> Tensor | None:
    """A number, ``[]``, ``[C]``, ``[T, C]`` or ``[C, P]`` as ``[C, T or 1, P or 1]``; 0 is None."""
    like: dict[str, Any] = {"dtype": layout.dtype, "device": layout.device}
    if is_number(value) and value == 0:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((1, 1, 1), float(value), **like).expand(count, 1, 1)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if value.ndim == 0:
        return value.expand(count, 1, 1)
    if value.shape == (count,):
        return value.view(count, 1, 1)
    if value.shape == (tasks, count):
        return value.T.unsqueeze(-1)
    if value.shape == (count, layout.numel):
        return value.unsqueeze(1)
    raise ValueError(
        f"{name}: expected a number or shape [], [C], [T, C] or [C, P] with T = {tasks}, C = "
        f"{count}, P = {layout.numel}, got {list(value.shape)}"
    )


def check_options(read: str, memory: str) -> None:
    check_choice("read", read, READS)
    check_choice("memory", memory, STREAM_MEMORY)
