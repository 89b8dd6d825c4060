"""Parameters from which the inner loop starts, in the forms that users pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout

Start = Tensor | Mapping[str, Tensor]


def read_start(start: Start | None, layout: ParameterLayout, module: nn.Module) -> Tensor | None:
    """The parameters to start from as an arena ``[P]`` or ``[T, P]``, differentiable in them.

    Args:
        start: an arena, whose shape the engine checks; None: none; or name -> ``[*shape]`` for all
            tasks or ``[T, *shape]``. Parameters that it lacks are the module's own.
        layout: the adapted parameters.
        module: their module.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    if not isinstance(start, Mapping):
        return start
    unknown = [name for name in start if name not in layout.names]
    if unknown:
        raise ValueError(
            f"start: expected names of adapted parameters, {list(layout.names)}, got {unknown}"
        )
    own = dict(module.named_parameters())
    tensors = {name: start.get(name, own[name]) for name in layout.names}
    counts = {_tasks(n, tensors[n], s) for n, s in zip(layout.names, layout.shapes, strict=True)}
    tasks = sorted(count for count in counts if count is not None)
    if len(tasks) > 1:
        raise ValueError(f"start: expected one number of tasks, got {tasks}")
    if tasks:
        shapes = zip(layout.names, layout.shapes, strict=True)
        tensors = {name: tensors[name].expand(tasks[0], *shape) for name, shape in shapes}
    return layout.flatten(tensors)


def _tasks(name: str, tensor: Tensor, shape: torch.Size) -> int | None:
    """The number of tasks of a parameter ``[T, *shape]``; None for one of all tasks."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"start: expected a tensor for {name!r}, got {type(tensor).__name__}")
    if tensor.shape == shape:
        return None
    if tensor.shape[1:] != shape:
        raise ValueError(
            f"start: expected {name!r} of shape {list(shape)} or [T, {str(list(shape))[1:]}, "
            f"got {list(tensor.shape)}"
        )
    return len(tensor)
