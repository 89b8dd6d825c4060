"""A meta-gradient that came before, ready to be taken again on other values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core import backend
from fastmeta.engines.program.call import Call


class CachedMetaGradient:
    """What a learner's last meta-gradient was, so that the next can skip what has not changed.

    It holds while every dictionary it knows has the very objects it had, and tensors have their
    shapes, dtypes and flags; the compiled step looks at all of that in one go. Where anything is
    not as it was, also harmlessly, the answer is None, and the ordinary way decides what it means.

    Args:
        learner: whose options count, all that its ``__dict__`` has.
        call: of the module's own parameters, whole and compiled.
        lr: the step sizes as the ops take them, made from a number.
        data: support_x, support_y, query_x, query_y.
        tables: the dictionaries on which the call's program depends.
    """

    def __init__(
        self,
        learner: nn.Module,
        call: Call,
        lr: Tensor,
        data: tuple[Tensor, ...],
        tables: list[dict[str, Any]],
    ) -> None:
        program = call.program
        tables = [vars(learner), learner._modules, *tables]
        # Here and not in the step, whose references the garbage collector would not see.
        self._held = tuple((table, tuple(table), tuple(table.values())) for table in tables)
        self._learner, self._theta, self._frozen = vars(learner), program.adapted, program.frozen
        self._call, self._lr = call, lr
        options = list(program.output_shape), call.steps, call.first_order, call.keep
        tensors = list(program.adapted), list(program.frozen), list(data)
        self._step = backend._C.CachedStep(program.code, lr, *tensors, *options)

    def __call__(
        self, learner: nn.Module, data: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Meta-loss, outputs and the gradient ``[P]``; None: take the ordinary way."""
        if (
            torch.compiler.is_compiling()
            or learner.__dict__ is not self._learner  # a copy of the learner
            or backend._override is not None
        ):
            return None
        now = self._held, self._theta, self._frozen, *data
        if self._call.graphs is None:
            return self._step(*now)
        return self._call.loss_and_gradient(self._lr, data)[:3] if self._step.holds(*now) else None
