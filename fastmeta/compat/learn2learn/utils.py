"""Differentiable copies of modules and their update, as in ``learn2learn.utils``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmeta.learners.gradient._module_copy import Module, copy_module, replace_tensors


def clone_module(module: Module, memo: dict[Tensor, Tensor] | None = None) -> Module:
    """A copy of a module whose parameters are clones, connected to the original by autograd.

    As in learn2learn, buffers that require no gradient are not copied: a clone's batch norms update
    the original's running statistics. (``fastmeta.MAML.clone`` copies them.)

    Args:
        module: any module; it is not changed. Any other object is returned unchanged.
        memo: clones of tensors by the original, to pass from call to call for modules that share
            parameters.

    Returns:
        A module of the same type. Its parameters are tensors with a graph, not ``nn.Parameter``.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> l2l.clone_module(net)(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    if not isinstance(module, nn.Module):
        return module
    return copy_module(module, buffer=_clone_of_differentiable, tensors=memo)


def update_module(
    module: Module,
    updates: Sequence[Tensor | None] | None = None,
    memo: dict[Tensor, Tensor] | None = None,
) -> Module:
    """Replace the module's parameters p by ``p + update``, differentiably.

    Args:
        module: a clone; its parameters are replaced, the old tensors are not changed.
        updates: one a parameter, in the order of ``module.parameters()``; None skips the parameter.
            Without this argument the ``.update`` attributes of parameters and buffers are taken,
            and set to None.
        memo: new tensors by the old, to pass from call to call for modules that share parameters.

    Returns:
        The module.

    Raises:
        ValueError: another number of updates than of parameters.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = l2l.clone_module(net)
        >>> updates = [torch.ones_like(p) for p in clone.parameters()]
        >>> torch.equal(l2l.update_module(clone, updates).bias, net.bias + 1)
        True
    """
    pending: dict[Tensor, Tensor | None] = {}
    for tensor in _tensors(module):
        pending.setdefault(tensor, getattr(tensor, "update", None))
        tensor.update = None  # type: ignore[attr-defined]
    if updates is not None:
        params = list(module.parameters())
        check_length("updates", updates, params)
        pending.update(zip(params, updates, strict=True))
    new = {} if memo is None else memo
    new.update({t: t + u for t, u in pending.items() if u is not None and t not in new})
    replace_tensors(module, new)
    return module


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Detach a clone's parameters, and its buffers with a graph, in place.

    Args:
        module: a clone; any other object than a module is ignored.
        keep_requires_grad: whether tensors that required gradients require them again, as leaves.

    Example:
        >>> import torch
        >>> import fastmeta.compat.learn2learn as l2l
        >>> clone = l2l.clone_module(torch.nn.Linear(2, 1))
        >>> l2l.detach_module(clone, keep_requires_grad=True)
        >>> clone.weight.is_leaf, clone.weight.requires_grad
        (True, True)
    """
    if not isinstance(module, nn.Module):
        return
    for tensor in dict.fromkeys(_tensors(module)):
        if tensor.requires_grad:
            tensor.detach_().requires_grad_(keep_requires_grad)


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """A differentiable clone of each tensor."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A differentiable clone of each tensor, by name."""
    return {name: p.clone() for name, p in param_dict.items()}


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of predictions ``[B, N]`` whose largest score is at the target ``[B]``."""
    return (preds.argmax(dim=1) == targets).float().mean()


def check_length(name: str, values: Sequence[Any], params: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is one value a parameter."""
    if len(values) != len(params):
        raise ValueError(f"{name}: expected one a parameter, {len(params)}, got {len(values)}")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield every registered parameter and buffer, once for each place of registration."""
    for m in module.modules():
        for table in (m._parameters, m._buffers):
            yield from (tensor for tensor in table.values() if tensor is not None)


def _clone_of_differentiable(buffer: Tensor) -> Tensor:
    return buffer.clone() if buffer.requires_grad else buffer
