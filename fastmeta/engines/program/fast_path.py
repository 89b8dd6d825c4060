"""The fast path: repeat the last meta-gradient on new values, without its set-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core import backend
from fastmeta.engines.base import MetaGradient, TaskBatch
from fastmeta.engines.program.call import Call
from fastmeta.engines.program.names import NamesRead


class CachedMetaGradient:
    """A learner's last meta-gradient, kept so that the next one can skip its set-up.

    Valid while the learner's and the module's attributes are the same objects and the tensors keep
    shape, dtype and flags; compiled code compares all of them in one call. On any change the result
    is None and the caller takes the slow path.

    Args:
        learner: its options are all entries of its ``__dict__``.
        call: the last call, on the module's own parameters; one compiled call for all tasks.
        step_sizes: as the ops take them, made from a number.
        batch: the batch of the last call.
        tables: the dictionaries on which the call's program depends.
        names: the globals and attributes on which it depends.
    """

    def __init__(
        self,
        learner: nn.Module,
        call: Call,
        step_sizes: Tensor,
        batch: TaskBatch,
        tables: list[dict[str, Any]],
        names: NamesRead,
    ) -> None:
        program = call.program
        tables = [vars(learner), learner._modules, *tables]
        # Held here: the garbage collector does not see references in the compiled step.
        self._held = tuple((table, tuple(table), tuple(table.values())) for table in tables)
        self._learner, self._theta, self._frozen = vars(learner), program.learned, program.frozen
        self._call, self._step_sizes, self._shares = call, step_sizes, bool(program.shared_names)
        self._names = names if names else None  # most networks read none
        self._step = backend._C.CachedStep(
            # In the order of its constructor, which takes no names.
            program.code,
            step_sizes,
            list(program.learned),
            list(program.frozen),
            list(batch.data),
            list(program.output_shape),
            call.options.steps,
            call.options.first_order,
            call.keep,
        )

    def __call__(
        self, learner: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> MetaGradient | None:
        """Meta-loss, outputs and gradients; None: take the slow path."""
        if not self._is_possible(learner):
            return None
        state = self._held, self._theta, self._frozen, *data
        try:
            if self._call.graphs is None:
                result = self._step(*state)
            # The graphs check the labels and copy the batch themselves; only validity is checked
            # here.
            elif self._step.holds(*state):
                result = self._call.loss_and_gradient(self._step_sizes, TaskBatch(*data))[:3]
            else:
                result = None
        except ValueError:
            # Labels that the program does not take: the slow path raises, or has another engine.
            return None
        if result is None:
            return None
        loss, outputs, arena = result
        if not self._shares:
            return MetaGradient(loss, outputs, arena, None, {})
        return self._call.as_meta_gradient(loss, outputs, arena)

    def meta_loss(
        self, learner: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Meta-loss with a graph, and outputs; None: take the slow path."""
        # Without gradients the slow path has less to do.
        if not (self._is_possible(learner) and torch.is_grad_enabled()):
            return None
        state = self._held, self._theta, self._frozen, *data
        try:
            if self._call.graphs is None:
                return self._step.meta_loss(*state)
            if not self._step.holds(*state):
                return None
            return self._call.meta_loss(self._theta, self._step_sizes, TaskBatch(*data))
        except ValueError:
            return None  # as above

    def _is_possible(self, learner: nn.Module) -> bool:
        return not (
            torch.compiler.is_compiling()
            or learner.__dict__ is not self._learner  # a copy of the learner
            or backend._override is not None  # use_backend() is in force
            or (self._names is not None and not self._names.are_unchanged())
        )
