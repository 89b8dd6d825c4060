"""Concatenation of features, and parameters that are an input of every example.

A program has no instructions for these. Linear layers with constant weights make them: zeros, to
which a parameter is the bias, and matrices of 0 and 1, which put features in their places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.engines.program.builder import BatchSize, Builder, Value, as_value
from fastmeta.engines.program.trace import LoweringError
from fastmeta.ops.task_program.bytecode import Opcode

# Above so many features the constant matrices take longer than the layers around them.
_MOST_FEATURES = 128


class Repeated(NamedTuple):
    """A parameter ``[n]`` that every example of the batch gets."""

    parameter: nn.Parameter


def expand(b: Builder, input: Any, *sizes: Any) -> Repeated:
    """``parameter.expand(x.shape[0], -1)`` of a parameter ``[n]`` or ``[1, n]``."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    is_row = isinstance(input, nn.Parameter) and input.shape in (
        (input.numel(),),
        (1, input.numel()),
    )
    if not is_row or len(sizes) != 2 or sizes[0] is not BatchSize:
        raise LoweringError("it is not of a parameter [n] to the examples of the batch")
    if sizes[1] not in (-1, input.numel()):
        raise LoweringError(f"it expands {input.numel()} features to {sizes[1]}")
    return Repeated(input)


def cat(b: Builder, tensors: Any, dim: int = 0) -> Value:
    """``torch.cat`` of examples' features, and of repeated parameters, along the features."""
    parts = list(tensors) if isinstance(tensors, (tuple, list)) else []
    given = [part for part in parts if not isinstance(part, Repeated)]
    if not given:
        raise LoweringError("nothing in it is computed from the input")
    values = [as_value(part) for part in given]
    if any(len(value.shape) != 1 for value in values) or dim not in (1, -1):
        raise LoweringError("it joins other dimensions than the features [B, n]")
    whole = [_spread(b, p, values[0]) if isinstance(p, Repeated) else as_value(p) for p in parts]
    widths = [value.shape[0] for value in whole]
    if sum(widths) > _MOST_FEATURES:
        raise LoweringError(f"it joins {sum(widths)} features, more than {_MOST_FEATURES}")
    placed: list[Value] = []
    for value, width in zip(whole, widths, strict=True):
        begin = sum(part.shape[0] for part in whole[: len(placed)])
        matrix = b.zeros(sum(widths), width)
        matrix[begin : begin + width] = torch.eye(width).to(matrix)
        placed.append(_linear(b, value, matrix))
    joined = placed[0]
    for value in placed[1:]:
        joined = b.emit(Opcode.ADD, joined, joined.shape, "", x2=value.at)
    b.layers.append(f"join {' + '.join(map(str, widths))}")
    return joined


def _spread(b: Builder, repeated: Repeated, like: Value) -> Value:
    """The parameter as a value: zero times the features of each example, plus the parameter."""
    (features,), parameter = like.shape, repeated.parameter
    zeros = b.zeros(parameter.numel(), features)
    reference = b.reference(parameter, tuple(parameter.shape))
    return _linear(b, like, zeros, bias=reference)


def _linear(b: Builder, x: Value, weight: Tensor, **fields: int) -> Value:
    outputs, inputs = weight.shape
    return b.emit(
        Opcode.LINEAR,
        x,
        (outputs,),
        "",
        weight=b.constant(weight, (outputs, inputs)),
        args=(inputs, outputs),
        **fields,
    )
