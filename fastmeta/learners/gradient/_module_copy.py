"""Differentiable copies of a module, and the replacement of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

Copy = Callable[[Tensor], Tensor]


def clone_module(module: Module) -> Module:
    """A copy of a module whose parameters are clones, connected to the original by autograd.

    Tied parameters stay tied, a submodule used in two places stays one submodule, and buffers are
    cloned too, so that the copy's running statistics are its own.

    Args:
        module: any module; it is not changed.

    Returns:
        A module of the same type. Its parameters are tensors with a graph, not ``nn.Parameter``.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> copy = clone_module(net)
        >>> copy(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    return copy_module(module)


def copy_module(
    module: Module,
    parameter: Copy = Tensor.clone,
    buffer: Copy = Tensor.clone,
    tensors: dict[Tensor, Tensor] | None = None,
) -> Module:
    """A copy of a module whose tensors two functions copy.

    Args:
        module: any module; it is not changed.
        parameter, buffer: functions that copy a parameter and a buffer.
        tensors: copies that exist already, by the original; new copies are added.
    """
    tensors = {} if tensors is None else tensors
    copy: Module = _copy(module, parameter, buffer, tensors, {})
    return copy


def replace_tensors(module: nn.Module, new: dict[Tensor, Tensor]) -> None:
    """Replace tensors by new ones in every place where they are registered."""
    for m in module.modules():
        tables: tuple[dict[str, Any], ...] = (m._parameters, m._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor in new:
                    table[name] = new[tensor]


def shallow_copy(module: Module) -> Module:
    """A new module with the same parameters, buffers, submodules and hooks."""
    copy = module.__new__(type(module))
    copy.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    return copy


def _copy(
    module: Any,
    parameter: Copy,
    buffer: Copy,
    tensors: dict[Tensor, Tensor],
    modules: dict[nn.Module, nn.Module],
) -> Any:
    if module is None:
        return None
    if module in modules:
        return modules[module]
    copy = modules[module] = shallow_copy(module)
    for table, copied in ((copy._parameters, parameter), (copy._buffers, buffer)):
        for name, tensor in table.items():
            if tensor is not None:
                if tensor not in tensors:
                    tensors[tensor] = copied(tensor)
                table[name] = tensors[tensor]
    for name, child in copy._modules.items():
        copy._modules[name] = _copy(child, parameter, buffer, tensors, modules)
    return copy
