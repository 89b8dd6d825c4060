"""What a trace of a module depends on, and whether it is still so."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_STANDARD = frozenset(nn.Module().__dict__)

_TABLES = ("_parameters", "_buffers", "_modules")  # by name, in order, and by identity

_WATCHED = ("training", *_HOOKS)

_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = (
    every_module._global_forward_hooks,
    every_module._global_forward_pre_hooks,
    every_module._global_backward_hooks,
    every_module._global_backward_pre_hooks,
)

_OPAQUE = (Tensor, nn.Module, type, FunctionType, ModuleType)

_DEPTH = 4  # of containers and objects inside each other

_SCALARS = (bool, int, float, complex, str, type(None))


def hooked(module: nn.Module) -> bool:
    """Whether a hook runs at the module's calls."""
    return any(module.__dict__[name] for name in _HOOKS)


def globally_hooked() -> bool:
    """Whether a hook runs at the calls of every module."""
    return any(_GLOBAL_HOOKS)


def is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


class ModuleSnapshot:
    """The state of a module now: its submodules, flags, options, hooks and parameters.

    ``is_unchanged()`` compares all of it. It runs at every call of a task program, so the comparing
    is left to C (tuples and dicts). Attributes of the user's own modules count by value if they are
    numbers, strings, or containers and objects of such, otherwise by identity. Values of parameters
    and buffers do not count; globals, class attributes and closures are not seen.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
        >>> snapshot = ModuleSnapshot(net)
        >>> snapshot.is_unchanged()
        True
        >>> snapshot = net.eval() and snapshot
        >>> snapshot.is_unchanged()
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooked = globally_hooked()
        self._modules = list(module.modules())
        self._simple, self._nested = [], []
        self._deep = False
        self._contents = _contents(self._modules)
        for m in self._modules:
            namespace = m.__dict__
            own = [name for name in namespace if name not in _STANDARD]
            simple = [name for name in own if _is_option(m, namespace[name])]
            get = itemgetter(*_WATCHED, *simple)
            values = tuple(_copied(value) for value in get(namespace))
            self._simple.append((namespace, len(namespace), get, values))
            nested = [name for name in own if name not in simple]
            if nested:
                self._nested.append((namespace, nested, _state(namespace, nested)))
                self._deep = self._deep or any(_has_contents(namespace[name]) for name in nested)
        # Kept, so that no id is reused.
        self._parameters, self._buffers = list(module.parameters()), list(module.buffers())
        self._kinds = _kinds([*self._parameters, *self._buffers])

    def tables(self) -> list[dict[str, Any]] | None:
        """The dictionaries that make up the state: while their objects are the same, so is it.

        But for the kinds of parameters and buffers. None where objects inside have a state of their
        own.
        """
        if self._deep:
            return None
        return [*_GLOBAL_HOOKS, *(table for m in self._modules for table in module_tables(m))]

    def is_unchanged(self) -> bool:
        try:
            for namespace, size, get, values in self._simple:
                if len(namespace) != size or get(namespace) != values:
                    return False
            for namespace, names, state in self._nested:
                if _state(namespace, names) != state:
                    return False
        except KeyError:  # an attribute is gone
            return False
        if _contents(self._modules) != self._contents:
            return False
        if _kinds([*self._parameters, *self._buffers]) != self._kinds:
            return False
        return globally_hooked() == self._hooked


def module_tables(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of one module."""
    return [module.__dict__, *(module.__dict__[name] for name in (*_TABLES, *_HOOKS))]


class _Identity:
    """Equal to another of the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    __hash__ = object.__hash__


def _is_option(module: nn.Module, value: Any) -> bool:
    """Whether ``==`` compares the attribute safely: what torch's own layers keep."""
    return is_torchs_own(module) and type(value) in (*_SCALARS, tuple)


def _has_contents(value: Any) -> bool:
    """Whether what the value is can change while it stays the same object."""
    return not (type(value) in _SCALARS or isinstance(value, _OPAQUE))


def _contents(modules: list[nn.Module]) -> list[tuple[str, int]]:
    tables = (m.__dict__[table] for m in modules for table in _TABLES)
    return [(name, id(value)) for table in tables for name, value in table.items()]


def _state(namespace: dict[str, Any], names: list[str]) -> list[Any]:
    return [_comparable(namespace[name]) for name in names]


def _comparable(value: Any, depth: int = _DEPTH) -> Any:
    """A copy that can be compared: containers and plain objects by what is in them."""
    if type(value) in _SCALARS:
        return value
    if depth == 0 or isinstance(value, _OPAQUE):
        return _Identity(value)
    if type(value) in (list, tuple):
        return [_comparable(item, depth - 1) for item in value]
    if type(value) is dict:
        pairs = value.items()
        return [(key, _comparable(item, depth - 1)) for key, item in pairs]
    inside = getattr(value, "__dict__", None)
    if inside is None:
        return _Identity(value)
    return [_Identity(value), _comparable(dict(inside), depth - 1)]


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device, bool]]:
    return [(p.shape, p.dtype, p.device, p.requires_grad) for p in tensors]
