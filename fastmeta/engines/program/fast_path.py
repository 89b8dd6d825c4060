"""The fast path: the same meta-gradient again, on other values, without any of the set-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core import backend
from fastmeta.engines.base import TaskBatch
from fastmeta.engines.program.call import Call


class CachedMetaGradient:
    """A learner's last meta-gradient, kept so that the next can skip its set-up.

    Valid while the learner's and the module's attributes are the same objects and the tensors keep
    shape, dtype and flags; compiled code compares all of them in one go. On any change the call
    returns None and the caller takes the slow path.

    Args:
        learner: its options are all entries of its ``__dict__``.
        call: of the module's own parameters, whole and compiled.
        step_sizes: as the ops take them, made from a number.
        batch: of the last call.
        tables: the dictionaries on which the call's program depends.
    """

    def __init__(
        self,
        learner: nn.Module,
        call: Call,
        step_sizes: Tensor,
        batch: TaskBatch,
        tables: list[dict[str, Any]],
    ) -> None:
        program = call.program
        tables = [vars(learner), learner._modules, *tables]
        # Held here: the garbage collector does not see references in the compiled step.
        self._held = tuple((table, tuple(table), tuple(table.values())) for table in tables)
        self._learner, self._theta, self._frozen = vars(learner), program.adapted, program.frozen
        self._call, self._step_sizes = call, step_sizes
        self._step = backend._C.CachedStep(
            program.code,
            step_sizes,
            list(program.adapted),
            list(program.frozen),
            list(batch),
            list(program.output_shape),
            call.options.steps,
            call.options.first_order,
            call.keep,
        )

    def __call__(
        self, learner: nn.Module, batch: TaskBatch
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Meta-loss, outputs and the gradient ``[P]``; None: take the slow path."""
        if (
            torch.compiler.is_compiling()
            or learner.__dict__ is not self._learner  # a copy of the learner
            or backend._override is not None
        ):
            return None
        state = self._held, self._theta, self._frozen, *batch
        if self._call.graphs is None:
            return self._step(*state)
        if not self._step.holds(*state):
            return None
        return self._call.loss_and_gradient(self._step_sizes, batch)[:3]
