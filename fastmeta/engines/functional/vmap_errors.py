"""Modules that cannot be vmapped over tasks: the error, and the reasons that are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as every_module

from fastmeta.engines.base import InnerLoopOptions

# PyTorch has no public way to ask for hooks.
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_GLOBAL_BACKWARD_HOOKS = (
    every_module._global_backward_hooks,
    every_module._global_backward_pre_hooks,
)

# Words of errors of allocators, on a GPU and on a CPU.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

# Words of errors that PyTorch raises for ops without a batching rule; it has no class for them.
_WORDS = ("vmap", "batching rule", "functorch", "batchedtensor")

Result = TypeVar("Result")

_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # the reason of the error
_warned: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # the reason of the last warning


class VmapError(RuntimeError):
    """Raised if a module or its loss cannot be vmapped over tasks, or would compute something else.

    Attributes:
        reason: what cannot be vmapped, and why.
    """

    def __init__(self, subject: str, error: Exception) -> None:
        sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        self.reason = f"{subject} cannot be vmapped: {sentence}"
        super().__init__(
            f"{subject} cannot be vmapped over tasks; task_chunk=1 runs the tasks one at a time, "
            f"without vmap. The reason: {sentence}"
        )


@contextmanager
def vmap_errors(subject: str, tasks: int) -> Iterator[None]:
    """Context that turns errors of vmap into VmapError with their subject, for several tasks."""
    try:
        yield
    except RuntimeError as error:
        of_vmap = any(word in str(error).lower() for word in _WORDS)
        if tasks == 1 or isinstance(error, VmapError) or not of_vmap:
            raise
        raise VmapError(subject, error) from error


@contextmanager
def memory_errors(options: InnerLoopOptions) -> Iterator[None]:
    """Context in which an error of a full memory names the options that need less."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise torch.OutOfMemoryError(
            f"the tasks that run together do not fit in memory. task_chunk=N runs N tasks at a "
            f"time (now {options.task_chunk!r}), memory='recompute' keeps no activations (now "
            f'{options.memory!r}), and FASTMETA_MEMORY_LIMIT bounds what "auto" takes. {error}'
        ) from error


def why_not_vmapped(module: nn.Module) -> str:
    """The known reason why a module runs one task at a time; empty if there is none."""
    for name, m in module.named_modules():
        # A gradient that passes a hook under vmap is never shown to it.
        if any(m.__dict__[table] for table in _BACKWARD_HOOKS):
            return f"{name or 'the module itself'} has backward hooks"
    if any(_GLOBAL_BACKWARD_HOOKS):
        return "there are backward hooks on every module"
    return _found.get(module, "")


def vmapped_if_possible(
    module: nn.Module, chunk: int | str | None, run: Callable[[Any], Result]
) -> Result:
    """``run(chunk)``, or ``run(1)`` if the tasks may run together and the module cannot be vmapped.

    The first time, a RuntimeWarning gives the reason. ``chunk`` may be None or ``"auto"``.
    """
    if isinstance(chunk, int):
        return run(chunk)
    reason = why_not_vmapped(module)
    if not reason:
        try:
            return run(chunk)
        except VmapError as error:
            reason = _found[module] = error.reason
    if _warned.get(module) != reason:
        _warned[module] = reason
        warnings.warn(
            f"{type(module).__name__} runs one task at a time, which is slower, because {reason}. "
            "task_chunk=1 asks for that without a warning",
            RuntimeWarning,
            stacklevel=2,
        )
    return run(1)
