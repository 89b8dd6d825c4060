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
_WATCHED = ("training", "_modules", "_buffers", *_HOOKS)
_OPAQUE = (Tensor, nn.Module, type, FunctionType, ModuleType)
_DEPTH = 4  # of containers and objects inside each other
_SCALARS = (bool, int, float, complex, str, type(None))


def hooked(module: nn.Module) -> bool:
    """Whether a hook runs at the module's calls."""
    return any(module.__dict__[name] for name in _HOOKS)


def globally_hooked() -> bool:
    """Whether a hook runs at the calls of every module."""
    return bool(
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


class Watch:
    """The state of a module now: its submodules, flags, options, hooks and parameters.

    ``holds()`` says whether all of it is unchanged; it runs at every call of a task program, so it
    leaves the comparing to C (tuples and dicts). Attributes of the user's own modules count by
    value where they are numbers, strings, or containers and objects of such, otherwise by identity.
    Values of parameters do not count; globals, class attributes and closures are not seen.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
        >>> watch = Watch(net)
        >>> watch.holds()
        True
        >>> watch = net.eval() and watch
        >>> watch.holds()
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooked = globally_hooked()
        self._simple, self._nested = [], []
        self._tables = [m._parameters for m in module.modules()]
        for m in module.modules():
            namespace = m.__dict__
            own = [name for name in namespace if name not in _STANDARD]
            simple = [name for name in own if _is_option(m, namespace[name])]
            get = itemgetter(*_WATCHED, *simple)
            values = tuple(_copied(value) for value in get(namespace))
            self._simple.append((namespace, len(namespace), get, values))
            nested = [name for name in own if name not in simple]
            if nested:
                self._nested.append((namespace, nested, _state(namespace, nested)))
        parameters = [p for table in self._tables for p in table.values()]
        self._identities = [id(p) for p in parameters]
        self._tensors = [p for p in parameters if p is not None]  # kept, so that no id is reused
        self._kinds = _kinds(self._tensors)

    def holds(self) -> bool:
        try:
            for namespace, size, get, values in self._simple:
                if len(namespace) != size or get(namespace) != values:
                    return False
            for namespace, names, state in self._nested:
                if _state(namespace, names) != state:
                    return False
        except KeyError:  # an attribute is gone
            return False
        now = [id(p) for table in self._tables for p in table.values()]
        if now != self._identities or _kinds(self._tensors) != self._kinds:
            return False
        return globally_hooked() == self._hooked


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
