"""The variables and attributes that a forward reads, and the check that they are unchanged."""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.engines.program.module_state import SCALARS, Identity, comparable

# With the separator: torchvision is no part of torch.
_OWN_CODE = tuple(f"{p}{os.sep}" for p in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_LIBRARIES = ("torch", "fastmeta", "numpy", "builtins", *sys.stdlib_module_names)
_NO_SETTINGS = ("torch", "fastmeta", "numpy")  # modules of classes whose attributes are not read
_DEPTH = 4  # of attributes of attributes
_MISSING = object()

_BY_VALUE = (*SCALARS, list, tuple, dict, set, frozenset)

# Their attributes are not followed: a forward reads values, or calls them and is followed there.
_LEAVES = (*_BY_VALUE, FunctionType, MethodType, Tensor, nn.Module)


class NamesRead:
    """The variables and attributes that the user's code mentions while it runs.

    A trace keeps the values that they had. Variables are globals and what enclosing functions
    define. Attributes are of modules, classes and plain objects; ``ModuleSnapshot`` compares
    layers. The code of a function lists the names that it mentions, so some may not have been read.

    Example:
        >>> names = NamesRead()
        >>> with names.recorded():
        ...     outputs = torch.nn.Linear(3, 2)(torch.zeros(1, 3))
        >>> names.are_unchanged()
        True
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], _Name] = {}
        self._seen: dict[tuple[int, type], Any] = {}  # its values are held: no id is reused

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the names that the functions mention that are called in the context."""
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # its callbacks are code of others
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(before)
            if collects:
                gc.enable()

    def are_unchanged(self) -> bool:
        """Whether every name has the value that it had."""
        return all(name.is_unchanged() for name in self._names.values())

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or (id(code), object) in self._seen:
            return
        if _is_library_file(code.co_filename) or _makes_a_namedtuple(frame):
            self._seen[id(code), object] = code
            return
        # A method of a base class reads the attributes of each class that it runs for.
        receiver = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        key = (id(code), type(receiver))
        if key in self._seen:
            return
        self._seen[key] = code
        for name in code.co_names:
            if name in frame.f_globals:
                self._add(frame.f_globals, name, code.co_names, _DEPTH)
        for cell in _cells(frame):
            self._add(cell, "cell_contents", code.co_names, _DEPTH)
        owner = type(receiver) if isinstance(receiver, nn.Module) else receiver
        self._add_attributes(owner, code.co_names, _DEPTH)

    def _add(self, owner: Any, name: str, mentioned: tuple[str, ...], depth: int) -> None:
        value = _read(owner, name)
        # A bound method is made anew at each look.
        if (id(owner), name) in self._names or value is _MISSING or isinstance(value, MethodType):
            return
        if isinstance(value, ModuleType):
            if _package(value.__name__) not in _LIBRARIES:
                self._add_attributes(value, mentioned, depth - 1)
            return
        self._names[id(owner), name] = _Name(owner, name, _state(value))
        self._add_attributes(value, mentioned, depth - 1)

    def _add_attributes(self, owner: Any, mentioned: tuple[str, ...], depth: int) -> None:
        kind = owner if isinstance(owner, type) else type(owner)
        if depth == 0 or isinstance(owner, _LEAVES) or _package(kind.__module__) in _NO_SETTINGS:
            return
        for name in mentioned:
            self._add(owner, name, mentioned, depth)


class _Name(NamedTuple):
    """A name of an owner (globals, a cell or another object), and the state of its value."""

    owner: Any
    name: str
    state: Any

    def is_unchanged(self) -> bool:
        state: bool = _state(_read(self.owner, self.name)) == self.state
        return state


def _state(value: Any) -> Any:
    """What ``==`` compares: numbers, strings and containers by value, objects by identity."""
    return comparable(value) if type(value) in _BY_VALUE else Identity(value)


def _cells(frame: FrameType) -> list[CellType]:
    """The variables of enclosing functions that a frame's function mentions."""
    code, values = frame.f_code, frame.f_locals
    names = set(code.co_freevars) - {"__class__"}  # which super() reads
    if not names:
        return []
    # A frame does not know its function. Several may have its code, each with its own variables.
    found: list[CellType] = []
    for function in gc.get_referrers(code):
        if isinstance(function, FunctionType):
            cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
            own = {name: cells[name] for name in names}
            if all(_read(own[n], "cell_contents") is values.get(n, _MISSING) for n in names):
                found += own.values()
    return found


def _read(owner: Any, name: str) -> Any:
    """The value of a name; ``_MISSING`` if there is none."""
    if type(owner) is CellType:
        try:
            return owner.cell_contents
        except ValueError:  # it was deleted
            return _MISSING
    return owner.get(name, _MISSING) if type(owner) is dict else getattr(owner, name, _MISSING)


def _makes_a_namedtuple(frame: FrameType) -> bool:
    """Whether the function is the ``__new__`` that ``collections.namedtuple`` made of a string."""
    return frame.f_code.co_filename == "<string>" and "_tuple_new" in frame.f_globals


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_library_file(path: str) -> bool:
    if path.startswith(_OWN_CODE):
        return True
    return path.startswith(_STANDARD_LIBRARY) and "site-packages" not in path
