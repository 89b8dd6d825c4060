"""Checks of the examples that a program leaves out: of weight 0, or of label -1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastmeta.core.absence import ABSENT
from fastmeta.engines.base import Examples
from fastmeta.engines.checks import check_examples
from fastmeta.engines.program.cache import check_plain
from fastmeta.engines.program.call import Call
from fastmeta.engines.program.lowering import Program
from fastmeta.engines.program.trace import LoweringError
from fastmeta.ops.task_program.bytecode import LossKind


def check_weights(program: Program, sets: Sequence[Examples]) -> None:
    """Raise LoweringError for weights that programs do not have."""
    check_examples(program.layout, *sets)
    for examples in sets:
        if examples.weight is not None:
            check_plain(examples.weight_name, examples.weight)
    if require_gradients(examples.weight for examples in sets):
        raise LoweringError("weights require gradients")
    if program.has_batch_norm:
        raise LoweringError("examples have weights, which its batch norm does not have")


def check_presence(program: Program, ops: Any, sets: Sequence[Examples]) -> None:
    """Raise LoweringError for absent examples, which a batch norm cannot leave out."""
    if program.loss.kind != LossKind.CROSS_ENTROPY:
        return
    try:
        # On CUDA the ops, which check again, find these labels checked.
        ops.check_labels(program.code, sets[0].y, sets[-1].y)
    except ValueError:
        for examples in sets:
            if (examples.y == ABSENT).any():
                raise LoweringError(
                    f"{examples.y_name} has labels -1, of absent examples, which its batch norm "
                    "cannot leave out"
                ) from None
        raise


def check_support_labels(call: Call, support: Examples) -> None:
    """Raise for labels ``[T, S]`` or ``[T, K, B]`` of any step that the program cannot take."""
    if call.program.has_batch_norm and not support.y.is_floating_point():
        check_presence(call.program, call.ops, [support._replace(y=support.y.flatten(1))])
    call.check_support_labels(support.y)


def require_gradients(tensors: Iterable[Any]) -> bool:
    """Whether gradients are enabled and some of the tensors require one."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
