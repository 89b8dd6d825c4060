"""Layers and functions of a task program, and the instructions to which they lower."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.engines.program import image_layers as images
from fastmeta.engines.program import joins
from fastmeta.engines.program.builder import (
    BatchSize,
    Builder,
    Handler,
    Handlers,
    Shape,
    Value,
    as_number,
    as_value,
    from_layer,
)
from fastmeta.engines.program.trace import LoweringError, Trace
from fastmeta.ops._activations import Activation
from fastmeta.ops.task_program.bytecode import Opcode

# Sides of square images to try if no batch gives the size; the usual ones first.
_SIDES = (28, 84, 32, 64, *range(1, 257))


def _linear(b: Builder, input: Any, weight: Any, bias: Any = None) -> Value:
    x = b.channels_first(as_value(input))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise LoweringError("its weight is no parameter [outputs, inputs]")
    outputs, inputs = weight.shape
    if not x.shape or x.shape[-1] != inputs:
        raise LoweringError(
            f"it takes {inputs} features, and examples there have shape {list(x.shape)}"
        )
    return b.emit(
        Opcode.LINEAR,
        x,
        (*x.shape[:-1], outputs),
        f"linear {inputs} to {outputs}",
        weight=b.reference(weight, (outputs, inputs)),
        bias=b.reference(bias, (outputs,)),
        args=(inputs, outputs),
    )


def _activation(
    b: Builder, input: Any, kind: Activation, *numbers: Any, inplace: bool = False
) -> Value:
    x = as_value(input)
    if inplace:
        b.overwrite(x)
    # An activation has two numbers in the code, whether it reads them or not.
    a, second = (*map(as_number, numbers), 0.0, 0.0)[:2]
    name = kind.name.lower().replace("_", " ")
    return b.emit(Opcode.ACTIVATION, x, x.shape, name, args=(kind, a, second))


def _relu(b: Builder, input: Any, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.RELU, inplace=inplace)


def _leaky_relu(
    b: Builder, input: Any, negative_slope: float = 0.01, inplace: bool = False
) -> Value:
    return _activation(b, input, Activation.LEAKY_RELU, negative_slope, inplace=inplace)


def _elu(b: Builder, input: Any, alpha: float = 1.0, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.ELU, alpha, inplace=inplace)


def _gelu(b: Builder, input: Any, *, approximate: str = "none") -> Value:
    kinds = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
    if approximate not in kinds:
        raise LoweringError(f"its approximation is {approximate!r}")
    return _activation(b, input, kinds[approximate])


def _silu(b: Builder, input: Any, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.SILU, inplace=inplace)


def _mish(b: Builder, input: Any, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.MISH, inplace=inplace)


def _tanh(b: Builder, input: Any, *, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.TANH, inplace=inplace)


def _sigmoid(b: Builder, input: Any, *, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.SIGMOID, inplace=inplace)


def _softplus(b: Builder, input: Any, beta: float = 1, threshold: float = 20) -> Value:
    return _activation(b, input, Activation.SOFTPLUS, beta, threshold)


def _add(b: Builder, input: Any, other: Any, *, alpha: float = 1, inplace: bool = False) -> Value:
    x, x2 = as_value(input), as_value(other)
    # No broadcasting: the instruction adds values of one shape.
    if alpha != 1 or x.shape != x2.shape:
        raise LoweringError(f"it adds {alpha} times {list(x2.shape)} to {list(x.shape)}")
    if x.channels_last != x2.channels_last:
        x, x2 = b.channels_last(x), b.channels_last(x2)
    if inplace:
        b.overwrite(x)
    return b.emit(Opcode.ADD, x, x.shape, "add", x2=x2.at)


def _layer_norm(
    b: Builder,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Value:
    x, shape = b.channels_first(as_value(input)), tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise LoweringError(
            f"it takes {list(shape)}, and examples there have shape {list(x.shape)}"
        )
    size = math.prod(shape)
    return b.emit(
        Opcode.LAYER_NORM,
        x,
        x.shape,
        f"layer norm {size}",
        weight=b.reference(weight, shape),
        bias=b.reference(bias, shape),
        args=(size, as_number(eps)),
    )


def _dropout(
    b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    # In evaluation dropout is the identity and needs no instruction.
    if training and p != 0:
        raise LoweringError("it draws random numbers in training mode")
    return as_value(input)


def _identity(b: Builder, input: Any) -> Value:
    return as_value(input)


def _flatten(b: Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    x = as_value(input)
    ndim = 1 + len(x.shape)  # the module sees the batch dimension too
    start, end = (dim + ndim if dim < 0 else dim for dim in (start_dim, end_dim))
    if not 0 < start <= end < ndim:
        raise LoweringError(f"it flattens dimensions {start_dim} to {end_dim} of {ndim}")
    middle = math.prod(x.shape[start - 1 : end])
    return _shaped(b, x, (*x.shape[: start - 1], middle, *x.shape[end:]))


def _reshape(b: Builder, input: Any, *shape: Any) -> Value:
    x = as_value(input)
    # view(a, b) and view((a, b)) are the same call.
    first, *rest = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if (first is not BatchSize and first != -1) or not all(isinstance(n, int) for n in rest):
        raise LoweringError("its first dimension is not the examples of the batch")
    size = math.prod(x.shape)
    # One -1 after the batch size is the size that completes the example.
    known = math.prod(n for n in rest if n != -1)
    if first is BatchSize and rest.count(-1) == 1 and known > 0 and size % known == 0:
        rest[rest.index(-1)] = size // known
    if min(rest, default=1) < 0 or math.prod(rest) != size:
        raise LoweringError("its first dimension is not the examples of the batch")
    return _shaped(b, x, tuple(rest))


def _shaped(b: Builder, x: Value, shape: tuple[int, ...]) -> Value:
    """x with another shape; a value that keeps its channels may stay channels-last in memory."""
    keeps_channels = bool(shape) and shape[:1] == x.shape[:1]
    return (x if keeps_channels else b.channels_first(x))._replace(shape=shape)


def _reshape_to(b: Builder, input: Any, shape: Any) -> Value:
    return _reshape(b, input, shape)


def _size(b: Builder, input: Any, dim: int | None = None) -> Any:
    shape = Shape(as_value(input).shape)
    return shape if dim is None else _item(b, shape, dim)


def _getattr(b: Builder, input: Any, name: str) -> Shape:
    if name != "shape":
        raise LoweringError(f"it reads {name}")
    return Shape(as_value(input).shape)


def _item(b: Builder, input: Any, index: Any) -> Any:
    if not isinstance(input, Shape) or not isinstance(index, int):
        raise LoweringError("it indexes a tensor")
    return (BatchSize, *input.example)[index]


# Looked up by exact type: a subclass may compute something else.
_LAYERS: dict[type[nn.Module], Handler] = {
    nn.Linear: from_layer(_linear, "weight", "bias"),
    nn.ReLU: from_layer(_relu, "inplace"),
    nn.LeakyReLU: from_layer(_leaky_relu, "negative_slope", "inplace"),
    nn.ELU: from_layer(_elu, "alpha", "inplace"),
    nn.GELU: from_layer(_gelu, "approximate"),
    nn.SiLU: from_layer(_silu, "inplace"),
    nn.Mish: from_layer(_mish, "inplace"),
    nn.Tanh: from_layer(_tanh),
    nn.Sigmoid: from_layer(_sigmoid),
    nn.Softplus: from_layer(_softplus, "beta", "threshold"),
    nn.Dropout: from_layer(_dropout, "p", "training"),
    nn.LayerNorm: from_layer(_layer_norm, "normalized_shape", "weight", "bias", "eps"),
    nn.Flatten: from_layer(_flatten, "start_dim", "end_dim"),
    nn.Identity: from_layer(_identity),
    **images.LAYERS,
}

_FUNCTIONS: dict[Any, Handler] = {
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: partial(_relu, inplace=True),
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.gelu: _gelu,
    F.silu: _silu,
    F.mish: _mish,
    torch.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    F.softplus: _softplus,
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    torch.flatten: _flatten,
    torch.reshape: _reshape_to,
    torch.add: _add,
    torch.cat: joins.cat,
    torch.concat: joins.cat,
    operator.add: _add,
    operator.iadd: partial(_add, inplace=True),
    operator.getitem: _item,  # x.shape[0] in a forward
    getattr: _getattr,
    **images.FUNCTIONS,
}

_METHODS: dict[str, Handler] = {
    "relu": _relu,
    "relu_": partial(_relu, inplace=True),
    "tanh": _tanh,
    "tanh_": partial(_tanh, inplace=True),
    "sigmoid": _sigmoid,
    "sigmoid_": partial(_sigmoid, inplace=True),
    "add": _add,
    "add_": partial(_add, inplace=True),
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "contiguous": _identity,  # the program decides about memory itself
    "size": _size,
    "expand": joins.expand,
    "mean": images.mean,
}

HANDLERS = Handlers(_LAYERS, _FUNCTIONS, _METHODS)


Result = TypeVar("Result")


def first_that_fits(
    trace: Trace, program: Callable[[tuple[int, ...]], Result | str]
) -> Result | str:
    """The first result for shapes of an example that fit, or the reason why there is none.

    ``program`` gives a result for a shape, or the reason why not.
    """
    shapes = list(examples_that_fit(trace)) or [()]
    # Only a batch tells the size of images; any size with a program shows that there is one.
    reasons = []
    for shape in shapes:
        result = program(shape)
        if not isinstance(result, str):
            return result
        reasons.append(result)
    if reasons[0] == reasons[-1]:
        return reasons[0]
    return f"{reasons[-1]} (with examples {list(shape)}; a batch shows which they are)"


def examples_that_fit(trace: Trace) -> Iterator[tuple[int, ...]]:
    """Yield shapes of an example that fit the first layer of a fixed size; none without one."""
    joins_inputs = False
    for node in trace.graph.nodes:
        joins_inputs = joins_inputs or node.target in (torch.cat, torch.concat)
        first = trace.attribute(node.target) if node.op == "call_module" else None
        if type(first) in _EXAMPLES:
            shapes = list(_EXAMPLES[type(first)](first))
            yield from shapes
            if joins_inputs and len(shapes[0]) == 1:  # a part of the features is of the example
                yield from ((n,) for n in range(1, shapes[0][0]))
            return


# Of any other layer the shape of an example cannot be told.
_EXAMPLES = {
    nn.Linear: lambda first: [(first.in_features,)],
    nn.LayerNorm: lambda first: [tuple(first.normalized_shape)],
    nn.BatchNorm1d: lambda first: [(first.num_features,)],
    nn.Conv1d: lambda first: [(first.in_channels, n) for n in _SIDES],
    nn.Conv2d: lambda first: [(first.in_channels, n, n) for n in _SIDES],
}
