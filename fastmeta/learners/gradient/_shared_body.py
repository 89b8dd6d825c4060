"""A body that the tasks share, on the examples of each task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.engines.functional.task_module import TaskModule
from fastmeta.engines.functional.vmap_errors import vmapped_if_possible
from fastmeta.engines.program.encoder import EncoderEngine
from fastmeta.engines.program.encoder_call import encode


def body_outputs(
    body: nn.Module,
    x: Tensor,
    name: str,
    engine: EncoderEngine | None,
    norm_statistics: str,
    task_chunk: int | None,
) -> Tensor:
    """The outputs ``[T, B, ...]`` for x ``[T, B, ...]``, norms by the statistics of each task.

    Args:
        body, x: the module and its inputs.
        name: of x, in errors.
        engine: runs the body's program if it has one; None: PyTorch does.
        norm_statistics: as in ``TaskModule``, and as in the engine.
        task_chunk: tasks that PyTorch takes together, None for all.
    """
    program = "" if engine is None else engine.program(body, x, lead=2)
    if not isinstance(program, str):
        return encode(program, x)
    call = TaskModule(body, norm_statistics)

    def outputs(chunk: int | None) -> Tensor:
        # Not split if one chunk is all: the backward of a split copies the gradient.
        if chunk is None or chunk >= len(x):
            return call.outputs({}, x, name)
        return torch.cat([call.outputs({}, part, name) for part in x.split(chunk)])

    with call.conditions():
        return vmapped_if_possible(body, task_chunk, outputs)
