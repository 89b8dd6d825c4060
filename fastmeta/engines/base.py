"""What both engines share: argument names, step weights, the limits of their derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Loss = Callable[[Tensor, Tensor], Tensor]

NORM_STATISTICS = ("batch", "running")


SUPPORT: tuple[str, ...] = ("support_x", "support_y")

QUERY: tuple[str, ...] = ("query_x", "query_y")


Method = TypeVar("Method", bound=Callable[..., Any])


def exclude_from_compile(method: Method) -> Method:
    """The method, which torch.compile calls as it is.

    Tracing it would lose, without a word, derivatives of the autograd functions inside.
    """
    as_it_is = torch.compiler.disable(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (as_it_is if torch.compiler.is_compiling() else method)(*args, **kwargs)

    return cast("Method", call)


def read_step_weights(weights: Sequence[float] | Tensor | None, steps: int) -> list[float]:
    """The weights w_1 .. w_K of the query losses as numbers; none of them for None.

    Raises:
        TypeError: ``weights`` is no sequence of numbers and no tensor.
        ValueError: not K of them, one that is not finite, or no steps.
    """
    if weights is None:
        return []
    expected = f"step_weights: expected {steps} finite numbers, one a step"
    if steps == 0:
        raise ValueError("step_weights: expected None, as there are no steps")
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise ValueError(f"{expected}, got shape {list(weights.shape)}")
        weights = weights.tolist()
    numbers = isinstance(weights, Sequence) and all(isinstance(w, (int, float)) for w in weights)
    if not numbers:
        raise TypeError(f"{expected}, got {weights!r}")
    if len(weights) != steps or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{expected}, got {list(weights)}")
    return [float(weight) for weight in weights]


class _RaiseOnDoubleBackward(torch.autograd.Function):
    """Its inputs; a derivative of them raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.clone() for grad in grads)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError(
            "the meta-gradient comes from the adjoint recursion, which keeps no graph: it cannot "
            "be differentiated again. MAML.clone() and adapt() unroll a graph that can."
        )


def once_differentiable(grads: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients; where a graph of them is asked for, one that raises when it is used."""
    if not torch.is_grad_enabled():
        return grads
    present = [grad.detach().requires_grad_() for grad in grads if grad is not None]
    marked = iter(_RaiseOnDoubleBackward.apply(*present) if present else ())
    return [None if grad is None else next(marked) for grad in grads]


def is_learned(lr: float | Tensor) -> TypeGuard[Tensor]:
    return isinstance(lr, Tensor) and lr.requires_grad
