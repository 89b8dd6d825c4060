"""State of a module on which its trace depends, and the check that it is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Attributes that every module has; the tables and hooks among them are compared separately.
_STANDARD = frozenset(nn.Module().__dict__)

_TABLES = ("_parameters", "_buffers", "_modules")  # compared by name, order and identity

_ALWAYS_COMPARED = ("training", *_HOOKS)

# The very dictionaries: PyTorch has no public way to ask for global hooks.
_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = (
    every_module._global_forward_hooks,
    every_module._global_forward_pre_hooks,
    every_module._global_backward_hooks,
    every_module._global_backward_pre_hooks,
)

# Compared by identity: code has no state to compare, tensors and modules are compared elsewhere.
_OPAQUE = (Tensor, nn.Module, type, FunctionType, ModuleType)

_DEPTH = 4  # of nested containers and objects; below it identity counts

SCALARS = (bool, int, float, complex, str, type(None))


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks on its calls."""
    return any(module.__dict__[name] for name in _HOOKS)


def globally_hooked() -> bool:
    """Whether there are hooks on the calls of every module."""
    return any(_GLOBAL_HOOKS)


def is_torch_layer(module: nn.Module) -> bool:
    """Whether the module's class is PyTorch's own, of ``torch.nn``."""
    return type(module).__module__.startswith("torch.nn.")


class ModuleSnapshot:
    """The state of a module at construction: submodules, flags, options, hooks, parameters.

    ``is_unchanged()`` compares all of it. It runs at every call of a task program, so tuples and
    dicts are compared in C. Attributes of user-defined modules are compared by value if they are
    numbers, strings, or containers and objects of these, otherwise by identity. Values of
    parameters and buffers are not compared. ``NamesRead`` has globals and class attributes.

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
            # Through the dict: nn.Module.__getattr__ is a Python call for each attribute.
            namespace = m.__dict__
            own = [name for name in namespace if name not in _STANDARD]
            simple = [name for name in own if _is_option(m, namespace[name])]
            get = itemgetter(*_ALWAYS_COMPARED, *simple)
            values = tuple(_copied(value) for value in get(namespace))
            # The number of attributes shows new ones, which ``get`` does not read.
            self._simple.append((namespace, len(namespace), get, values))
            nested = [name for name in own if name not in simple]
            if nested:
                self._nested.append((namespace, nested, _state(namespace, nested)))
                self._deep = self._deep or any(_has_contents(namespace[name]) for name in nested)
        # Held, so that no id of a tensor is reused while the snapshot compares ids.
        self._parameters, self._buffers = list(module.parameters()), list(module.buffers())
        self._kinds = _kinds([*self._parameters, *self._buffers])

    def tables(self) -> list[dict[str, Any]] | None:
        """The dictionaries of the state: if they hold the same objects, the state is unchanged.

        Shapes, dtypes and devices of parameters and buffers are not part of it. None if an object
        in the dictionaries has a state of its own, which can change while the object stays.
        """
        if self._deep:
            return None
        return [*_GLOBAL_HOOKS, *(table for m in self._modules for table in module_tables(m))]

    def is_unchanged(self) -> bool:
        """Whether the module's state equals the snapshot."""
        try:
            for namespace, size, get, values in self._simple:
                if len(namespace) != size or get(namespace) != values:
                    return False
            for namespace, names, state in self._nested:
                if _state(namespace, names) != state:
                    return False
        except KeyError:  # an attribute was deleted
            return False
        if _contents(self._modules) != self._contents:
            return False
        if _kinds([*self._parameters, *self._buffers]) != self._kinds:
            return False
        return globally_hooked() == self._hooked


def module_tables(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries with one module's state."""
    return [module.__dict__, *(module.__dict__[name] for name in (*_TABLES, *_HOOKS))]


class Identity:
    """Compares its object by identity, and keeps it alive so that its id is not reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    __hash__ = object.__hash__


def _is_option(module: nn.Module, value: Any) -> bool:
    """Whether ``==`` compares the attribute safely: scalars and tuples of torch's own layers."""
    # An attribute of a user's module may be a tensor or an array, whose == is no bool.
    return is_torch_layer(module) and type(value) in (*SCALARS, tuple)


def _has_contents(value: Any) -> bool:
    """Whether the value can change while it stays the same object."""
    return not (type(value) in SCALARS or isinstance(value, _OPAQUE))


def _contents(modules: list[nn.Module]) -> list[tuple[str, int]]:
    tables = (m.__dict__[table] for m in modules for table in _TABLES)
    return [(name, id(value)) for table in tables for name, value in table.items()]


def _state(namespace: dict[str, Any], names: list[str]) -> list[Any]:
    return [comparable(namespace[name]) for name in names]


def comparable(value: Any, depth: int = _DEPTH) -> Any:
    """A copy that ``==`` compares: containers and plain objects by their contents."""
    if type(value) in SCALARS:
        return value
    if depth == 0 or isinstance(value, _OPAQUE):
        return Identity(value)
    if type(value) in (list, tuple):
        return [comparable(item, depth - 1) for item in value]
    if type(value) is dict:
        pairs = value.items()
        return [(key, comparable(item, depth - 1)) for key, item in pairs]
    if type(value) in (set, frozenset):
        return set(value)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return Identity(value)
    return [Identity(value), comparable(dict(attributes), depth - 1)]


def _copied(value: Any) -> Any:
    # Hooks are added in place, so the dictionary itself would always equal itself.
    return value.copy() if isinstance(value, dict) else value


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device, bool]]:
    return [(p.shape, p.dtype, p.device, p.requires_grad) for p in tensors]
