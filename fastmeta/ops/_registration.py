"""Registration of the compiled ops with PyTorch's transforms and with autograd.

A new op calls ``register`` with a fake, which gives the outputs' shapes without running the kernel
(for torch.compile), and with a vmap rule unless tasks can be folded. Its derivatives are
``torch.autograd.Function``s with ``setup_context`` and ``jvp``, called through ``as_function``.

``torch.library.register_autograd`` would be shorter, but in torch 2.13 it fails under
``torch.func.grad`` and gives a silently zero tangent under ``torch.func.jvp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function, forward_ad

from fastmeta.core import backend


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge a vmapped dimension of ``size`` into the task dimension, which leads."""
    # A tensor that is not vmapped is the same for all samples: expanded without a copy at first.
    moved = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return moved.flatten(0, 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """The inverse of ``fold``: the vmapped dimension of ``size`` leads."""
    # A size of 0 leaves nothing to divide the tasks by.
    return x.unflatten(0, (size, x.shape[0] // size if size else 0))


def folding(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule for ``op`` that folds the vmapped dimension into the tasks."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        size = info.batch_size
        folded = (
            fold(arg, dim, size) if isinstance(arg, Tensor) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        )
        out = op(*folded)
        if isinstance(out, Tensor):
            return unfold(out, size), 0
        return tuple(unfold(o, size) for o in out), (0,) * len(out)

    return rule


def register(name: str, fake: Callable[..., Any], vmap: Callable[..., Any] | None = None) -> None:
    """Register a fake and a vmap rule for ``torch.ops.fastmeta.<name>``, if it is built.

    Args:
        name: of the op in ``csrc/library.cpp``.
        fake: takes the op's arguments and gives tensors of the outputs' shapes and dtypes.
        vmap: a rule of ``torch.library.register_vmap``; None: ``folding``.
    """
    if backend._C is None:  # nothing is built, and plain PyTorch needs no rules
        return
    op = getattr(torch.ops.fastmeta, name)
    torch.library.register_fake(f"fastmeta::{name}", fake)
    torch.library.register_vmap(f"fastmeta::{name}", vmap or folding(op))


def traces_transform() -> bool:
    """Whether torch.compile is tracing the inside of a torch.func transform.

    There it loses the derivative of an autograd.Function without a word, so ops trace their
    plain-PyTorch form instead.
    """
    return torch.compiler.is_compiling() and isinstance(
        torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter
    )


def is_native(op: str, x: Tensor) -> bool:
    """Whether ``op`` on ``x`` runs its native kernel here."""
    return not traces_transform() and backend.is_native(op, x)


def as_function(cls: type[Function], compiled: type[Function] | None = None) -> Callable[..., Any]:
    """``cls.apply`` with less overhead; under torch.compile, ``apply`` of a twin without ``jvp``.

    Args:
        cls: a Function with ``setup_context`` and ``jvp``.
        compiled: the twin, where it differs in more than ``jvp``, which torch.compile refuses.
    """
    twin: Any = compiled or type(f"{cls.__name__}Compiled", (cls,), {"jvp": Function.jvp})
    # ``Function.apply`` reads the signature of ``forward`` at every call, which takes longer than a
    # small op. Outside torch.func it does nothing more than the last line of ``apply``.
    plain: Any = super(Function, cls)
    forward: Any = cls.forward

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return twin.apply(*args)
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        args = tuple(unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args)
        # The graph's node takes longer than a small op, even where nothing is recorded.
        return plain.apply(*args) if _is_differentiated(args) else forward(*args)

    return apply


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    """Whether autograd, reverse or forward, records what is done with ``args``."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def contiguous_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape, dtype and device of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
