"""One call of an encoder's program, and its autograd Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastmeta.core.memory import kept_pages
from fastmeta.engines.autograd import once_differentiable
from fastmeta.engines.program.encoder_lowering import EncoderProgram

_ops: Any = torch.ops.fastmeta

_TWICE = (
    "a lowered encoder can be differentiated twice, not three times; the encoder itself can, "
    "which ProtoNet(..., lower=False) calls"
)


def encode(program: EncoderProgram, x: Tensor) -> Tensor:
    """The encoder's outputs ``[T, B, ...]`` for x ``[T, B, ...]``, twice differentiable.

    Each of the T batches has its own batch statistics. Running statistics are updated if the
    program says so; T is then 1.
    """
    with kept_pages():
        if torch.is_grad_enabled() and (x.requires_grad or program.learned):
            outputs = _Encode.apply(program, x, *program.learned)
        else:
            outputs = _forward(program, x, program.learned, _frozen(program, x), False, False)[0]
    return outputs.unflatten(-1, program.output_shape) if program.output_shape else outputs[..., 0]


def _forward(
    program: EncoderProgram,
    x: Tensor,
    learned: tuple[Tensor, ...],
    frozen: Tensor,
    keeps: bool,
    input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs ``[T, B, n]``, and what the backward reads; updates running statistics."""
    arena = _arena(learned, x)
    outputs, kept, statistics = _ops.encode(program.code, arena, frozen, x, keeps, input_grad)
    for running in program.running:
        running.update(statistics[0])
    return outputs, kept


class _Encode(torch.autograd.Function):
    """The outputs; the backward is another Function, so that it can be differentiated."""

    @staticmethod
    def forward(ctx: Any, program: EncoderProgram, x: Tensor, *learned: Tensor) -> Tensor:
        frozen, ctx.input_grad = _frozen(program, x), ctx.needs_input_grad[1]
        outputs, kept = _forward(program, x, learned, frozen, True, ctx.input_grad)
        ctx.program = program
        # The parameters, not a copy: autograd notices if they are written to before the backward.
        ctx.save_for_backward(x, kept, frozen, *learned)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = any(ctx.needs_input_grad[2:]), ctx.input_grad
        with kept_pages():
            grads = _EncodeBackward.apply(ctx.program, wanted, grad, *ctx.saved_tensors)
        return None, *grads


class _EncodeBackward(torch.autograd.Function):
    """The gradients to x and the parameters, from a cotangent; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        program: EncoderProgram,
        wanted: tuple[bool, bool],
        grad: Tensor,
        x: Tensor,
        kept: Tensor,
        frozen: Tensor,
        *learned: Tensor,
    ) -> tuple[Tensor | None, ...]:
        theta_grad, input_grad = wanted
        to_theta, to_x = _ops.encode_backward(
            program.code, _arena(learned, x), frozen, x, kept, grad, theta_grad, input_grad
        )
        ctx.program, ctx.input_grad = program, input_grad
        ctx.save_for_backward(grad, x, kept, frozen, *learned)
        ctx.set_materialize_grads(False)
        parts = _unflatten_dense_tensors(to_theta, learned) if theta_grad else [None] * len(learned)
        return to_x if input_grad else None, *parts

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, *learned_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad, x, kept, frozen, *learned = ctx.saved_tensors
        theta_dot = None
        if any(dot is not None for dot in learned_dot):
            both = zip(learned, learned_dot, strict=True)
            dots = tuple(torch.zeros_like(p) if dot is None else dot for p, dot in both)
            theta_dot = _arena(dots, x)
        if x_dot is None and theta_dot is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad(), kept_pages():
            to_grad, to_theta, to_x = _ops.encode_backward_backward(
                ctx.program.code,
                _arena(tuple(learned), x),
                frozen,
                x,
                kept,
                grad,
                theta_dot,
                x_dot,
                ctx.input_grad,
            )
        parts = _unflatten_dense_tensors(to_theta, learned) if learned else ()
        grads = [to_grad, to_x if ctx.input_grad else None, *parts]
        to_grad, to_x, *to_learned = once_differentiable(grads, _TWICE)
        return None, None, to_grad, to_x, None, None, *to_learned


def _arena(parameters: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The parameters joined, ``[P]``."""
    return _flatten_dense_tensors(parameters) if parameters else like.new_empty(0)


def _frozen(program: EncoderProgram, like: Tensor) -> Tensor:
    return _arena(program.frozen, like)
