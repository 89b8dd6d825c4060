"""Boundaries of the engines: threads take turns, no torch.compile, no double backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

Method = TypeVar("Method", bound=Callable[..., Any])


# Held during calls: they change the module's tables and switches of PyTorch, and restore them.
TURN = RLock()


_NO_TRANSFORMS = (
    "a learner was called inside a transform of torch.func (grad, vmap, jvp, ...), which cannot "
    "see its derivative. Take it by loss.backward() or torch.autograd.grad, and give all tasks to "
    "one call instead of vmapping it. The ops, such as fm.hvp and fm.inner_update, can be "
    "transformed"
)


def entry_point(method: Method) -> Method:
    """Make a method an entry of an engine: threads take turns, and nothing traces or transforms it.

    Tracing by torch.compile would silently drop the derivatives of the ``autograd.Function``
    classes inside. A transform of torch.func raises a RuntimeError.
    """
    # torch.compiler.disable would import torch.compile's tracer, which takes longer than torch.
    untraced = _disable_dynamo(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(_NO_TRANSFORMS)
        # The wrapper costs microseconds, so eager calls go around it.
        with TURN:
            return (untraced if torch.compiler.is_compiling() else method)(*args, **kwargs)

    return cast("Method", call)


_ADJOINT = (
    "the meta-gradient comes from the adjoint recursion, which keeps no graph: it cannot "
    "be differentiated again. MAML.clone() and adapt() unroll a graph that can."
)


class _RaiseOnBackward(torch.autograd.Function):
    """Identity whose backward raises a RuntimeError of the given words."""

    @staticmethod
    def forward(ctx: Any, why: str, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.why = why
        # Clones: autograd treats an output that is an input as a view of it.
        return tuple(grad.clone() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.why)


def once_differentiable(grads: list[Tensor | None], why: str = _ADJOINT) -> list[Tensor | None]:
    """Mark gradients as the last derivatives: a backward through them raises, and says ``why``.

    Without grad mode nobody can differentiate them again, and they are returned unchanged.
    """
    if not torch.is_grad_enabled():
        return grads
    # Leaves that require a gradient: else autograd would not record the node that raises.
    present = [grad.detach().requires_grad_() for grad in grads if grad is not None]
    marked = iter(_RaiseOnBackward.apply(why, *present) if present else ())
    return [None if grad is None else next(marked) for grad in grads]


def is_learned(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether a step size is a tensor that requires a gradient."""
    return isinstance(lr, Tensor) and lr.requires_grad
