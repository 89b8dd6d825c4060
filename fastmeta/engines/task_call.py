"""A module called with the parameters of many tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_choice
from fastmeta.core.module_inputs import check_inputs, inputs_of
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.plain_module import plain_module
from fastmeta.core.trees import Tree, first_tensor
from fastmeta.engines.auto import AutoEngine
from fastmeta.engines.base import NORM_STATISTICS, InnerLoopOptions, Loss
from fastmeta.engines.checks import check_arena
from fastmeta.engines.functional.engine import FunctionalEngine
from fastmeta.engines.program.cache import ProgramCache
from fastmeta.engines.program.engine import ProgramEngine, ProgramOptions

_Kind = tuple[tuple[str, ...] | None, str]
_programs: WeakKeyDictionary[nn.Module, dict[_Kind, ProgramCache]] = WeakKeyDictionary()


def task_call(
    module: nn.Module,
    params: Tensor | Mapping[str, Tensor],
    x: Tree,
    *,
    norm_statistics: str = "batch",
) -> Tree:
    """The outputs of a module on the inputs of T tasks, each with its own parameters.

    By a compiled task program if the module lowers to one and no gradient is needed, else vmapped.

    Args:
        module: any module.
        params: its trainable parameters as ``[P]`` for all tasks or ``[T, P]``, in the order of
            ``named_parameters``, such as the output of a hypernetwork; or a dict from names to
            ``[T, *shape]``. Parameters that a dict lacks are the module's own.
        x: ``[T, B, ...]``, or a tree as for ``MAML.meta_loss``.
        norm_statistics: as for ``fastmeta.MAML``.

    Returns:
        ``[T, B, ...]``, or a tree as the module gives it, differentiable any number of times in
        ``params``, ``x`` and the module's own parameters.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = torch.nn.Linear(3, 2)
        >>> generator = torch.nn.Linear(5, 8)  # from a description of a task to its 8 parameters
        >>> outputs = fm.task_call(net, generator(torch.randn(4, 5)), torch.randn(4, 10, 3))
        >>> outputs.shape
        torch.Size([4, 10, 2])
    """
    module = plain_module("module", module)
    x = inputs_of(module, "x", x)
    check_inputs("x", x)
    check_choice("norm_statistics", norm_statistics, NORM_STATISTICS)
    names = names_of(module, params) if isinstance(params, Mapping) else None
    layout = ParameterLayout.of(module, names)
    theta = layout.flatten(params) if isinstance(params, Mapping) else params
    tasks = len(first_tensor(x))
    check_arena("params", layout, theta, tasks)
    options = InnerLoopOptions(steps=0, norm_statistics=norm_statistics, adapt=names)
    engines = engines_of(module, F.mse_loss, options)  # the loss is never called
    return AutoEngine(*engines).outputs(theta.expand(tasks, layout.numel), x)


def engines_of(
    module: nn.Module, loss: Loss, options: InnerLoopOptions
) -> tuple[ProgramEngine, FunctionalEngine]:
    """Both engines of a module, whose programs are kept for as long as the module."""
    kind = options.adapt, options.norm_statistics
    cache = _programs.setdefault(module, {}).setdefault(kind, ProgramCache())
    program_options = ProgramOptions(compiled_only=True)
    program = ProgramEngine(module, loss, options, program_options, cache)
    return program, FunctionalEngine(module, loss, options)


def names_of(module: nn.Module, params: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the parameters given, in the module's order."""
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    unknown = [name for name in params if name not in trainable]
    if unknown or not params:
        raise ValueError(f"params: expected names among {trainable}, got {unknown or '{}'}")
    for name, tensor in params.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"params: expected a tensor for {name!r}, got {type(tensor).__name__}")
    return tuple(name for name in trainable if name in params)
