"""Derivatives of a kernel's derivatives, which are taken in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Formula = Callable[..., Any]


def save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Save a Function's tensors; its last input, a setting, becomes ``ctx.setting``."""
    *tensors, ctx.setting = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def filled(dots: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tangents of ``inputs``; None stands for zeros, and what follows is of no tensor."""
    pairs = zip(dots, inputs, strict=False)
    return tuple(torch.zeros_like(x) if dot is None else dot for dot, x in pairs)


def tangent(formula: Formula, ctx: Any, dots: tuple[Any, ...]) -> Any:
    """Tangent of ``formula``, in plain PyTorch; None stands for a tangent of zeros."""
    inputs = ctx.saved_tensors
    tangents = filled(dots, inputs)
    # Forward mode does not nest inside ``jvp``. The pullback is linear, and its derivative is the
    # tangent, whatever the cotangent at which it is taken.
    outputs, pullback, *_ = torch.func.vjp(lambda *p: formula(*p, ctx.setting), *inputs)
    zeros = tree_map(torch.zeros_like, outputs)
    return torch.func.vjp(pullback, zeros)[1](tangents)[0]


def pullback(formula: Formula, ctx: Any, directions: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Gradient of ``formula`` to the saved tensors, in plain PyTorch, and None for the setting."""
    back = torch.func.vjp(lambda *p: formula(*p, ctx.setting), *ctx.saved_tensors)[1]
    return *back(directions), None
