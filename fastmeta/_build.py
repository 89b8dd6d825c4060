"""From a trace to the instructions of a task program: every layer and function it knows."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmeta._code import Activation, Code, Instruction, LossCode, Opcode
from fastmeta._trace import Refusal, Trace, caller


class Value(NamedTuple):
    """A value of the program: which it is, and the shape that the module sees of one example."""

    at: int
    shape: tuple[int, ...]


class _BatchSize:
    """The number of examples, where a module asks for it."""


class _Shape(NamedTuple):
    """The shape of a value with its batch size, where a module asks for it."""

    example: tuple[int, ...]


class Builder:
    """The instructions of a trace for one shape of an example.

    Raises:
        Refusal: naming the module or function that the program does not have.
    """

    def __init__(self, trace: Trace, shape: tuple[int, ...]) -> None:
        self.trace = trace
        self.layers: list[str] = []
        self._sizes = [math.prod(shape)]
        self._instructions: list[Instruction] = []
        self._overwritten: list[tuple[int, int]] = []  # value, the instruction that does it
        self._adapts: set[int] = set()  # values that depend on adapted parameters
        self.output = self._run(Value(0, shape))
        self._check_overwritten()
        if 0 in self._sizes:
            raise Refusal("a tensor of model has no elements")
        if self.output.at not in self._adapts:
            raise Refusal("the outputs of model depend on no trainable parameter")

    def code(self, loss: LossCode | None) -> Code:
        return Code(
            values=tuple(self._sizes),
            instructions=tuple(self._instructions),
            parameters=self.trace.layout.numel,
            frozen=sum(p.numel() for p in self.trace.frozen),
            output=self.output.at,
            loss=loss,
        )

    def emit(
        self, opcode: Opcode, x: Value, shape: tuple[int, ...], name: str, **fields: Any
    ) -> Value:
        y = Value(len(self._sizes), shape)
        instruction = Instruction(opcode, x.at, y.at, **fields)
        if max(instruction.weight, instruction.bias) >= 0 or self._adapts & {
            x.at,
            instruction.x2,
        }:
            self._adapts.add(y.at)
        self._sizes.append(math.prod(shape))
        self._instructions.append(instruction)
        self.layers.append(name)
        return y

    def overwrite(self, x: Value) -> None:
        """The instruction that comes next works in place on ``x``."""
        self._overwritten.append((x.at, len(self._instructions)))

    def reference(self, tensor: Any, shape: tuple[int, ...]) -> int:
        """A weight or bias as an instruction names it; None is none."""
        if tensor is None:
            return -1
        if not isinstance(tensor, nn.Parameter):
            raise Refusal("a weight or bias of it is no parameter")
        if tensor.shape != shape:
            raise Refusal(f"a parameter of it has shape {list(tensor.shape)}, not {list(shape)}")
        return self.trace.reference(tensor)

    def _run(self, x: Value) -> Value:
        env: dict[fx.Node, Any] = {}
        for node in self.trace.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "placeholder":
                env[node] = x
            elif node.op == "get_attr":
                env[node] = self.trace.attribute(node.target)
            elif node.op != "output":
                env[node] = self._call(node, args, kwargs)
        (output,) = args  # the last node is the output
        if not isinstance(output, Value):
            raise Refusal("model does not return one tensor that comes from its input")
        if not self._instructions:
            raise Refusal("model has no layers")
        return output

    def _call(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        where = caller(node)
        if node.op == "call_module":
            layer = self.trace.attribute(node.target)
            what, known = f"is a {type(layer).__name__}", LAYERS.get(type(layer))
            handler = known and partial(known, layer=layer)
        else:
            name = getattr(node.target, "__name__", node.target)
            table = METHODS if node.op == "call_method" else FUNCTIONS
            what, handler = f"calls {name}", table.get(node.target)
        if handler is None:
            raise Refusal(f"{where} {what}, which the program does not have yet")
        try:
            inspect.signature(handler).bind(self, *args, **kwargs)
        except TypeError as error:
            raise Refusal(f"{where} {what} with unknown options: {error}") from error
        try:
            return handler(self, *args, **kwargs)
        except Refusal as refusal:
            raise Refusal(f"{where} {what}: {refusal}") from None

    def _check_overwritten(self) -> None:
        for value, writer in self._overwritten:
            readers = [i for i, ins in enumerate(self._instructions) if value in (ins.x, ins.x2)]
            if value in (0, self.output.at) or readers != [writer]:
                raise Refusal(
                    f"{self.layers[writer]} works in place on a tensor that is used elsewhere"
                )


def _linear(b: Builder, input: Any, weight: Any, bias: Any = None) -> Value:
    x = _value(input)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise Refusal("its weight is no parameter [outputs, inputs]")
    outputs, inputs = weight.shape
    if not x.shape or x.shape[-1] != inputs:
        raise Refusal(f"it takes {inputs} features, and examples there have shape {list(x.shape)}")
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
    x = _value(input)
    if inplace:
        b.overwrite(x)
    a, second = (*map(_number, numbers), 0.0, 0.0)[:2]
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
        raise Refusal(f"its approximation is {approximate!r}")
    return _activation(b, input, kinds[approximate])


def _silu(b: Builder, input: Any, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.SILU, inplace=inplace)


def _tanh(b: Builder, input: Any, *, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.TANH, inplace=inplace)


def _sigmoid(b: Builder, input: Any, *, inplace: bool = False) -> Value:
    return _activation(b, input, Activation.SIGMOID, inplace=inplace)


def _softplus(b: Builder, input: Any, beta: float = 1, threshold: float = 20) -> Value:
    return _activation(b, input, Activation.SOFTPLUS, beta, threshold)


def _add(b: Builder, input: Any, other: Any, *, alpha: float = 1, inplace: bool = False) -> Value:
    x, x2 = _value(input), _value(other)
    if alpha != 1 or x.shape != x2.shape:
        raise Refusal(f"it adds {alpha} times {list(x2.shape)} to {list(x.shape)}")
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
    x, shape = _value(input), tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise Refusal(f"it takes {list(shape)}, and examples there have shape {list(x.shape)}")
    size = math.prod(shape)
    return b.emit(
        Opcode.LAYER_NORM,
        x,
        x.shape,
        f"layer norm {size}",
        weight=b.reference(weight, shape),
        bias=b.reference(bias, shape),
        args=(size, _number(eps)),
    )


def _dropout(
    b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    if training and p != 0:
        raise Refusal("it draws random numbers in training mode")
    return _value(input)


def _identity(b: Builder, input: Any) -> Value:
    return _value(input)


def _flatten(b: Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    x = _value(input)
    ndim = 1 + len(x.shape)
    start, end = (dim + ndim if dim < 0 else dim for dim in (start_dim, end_dim))
    if not 0 < start <= end < ndim:
        raise Refusal(f"it flattens dimensions {start_dim} to {end_dim} of {ndim}")
    middle = math.prod(x.shape[start - 1 : end])
    return Value(x.at, (*x.shape[: start - 1], middle, *x.shape[end:]))


def _reshape(b: Builder, input: Any, *shape: Any) -> Value:
    x = _value(input)
    first, *rest = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if (first is not _BatchSize and first != -1) or not all(isinstance(n, int) for n in rest):
        raise Refusal("its first dimension is not the examples of the batch")
    size = math.prod(x.shape)
    known = math.prod(n for n in rest if n != -1)
    if first is _BatchSize and rest.count(-1) == 1 and known > 0 and size % known == 0:
        rest[rest.index(-1)] = size // known
    if min(rest, default=1) < 0 or math.prod(rest) != size:
        raise Refusal("its first dimension is not the examples of the batch")
    return Value(x.at, tuple(rest))


def _reshape_to(b: Builder, input: Any, shape: Any) -> Value:
    return _reshape(b, input, shape)


def _size(b: Builder, input: Any, dim: int | None = None) -> Any:
    shape = _Shape(_value(input).shape)
    return shape if dim is None else _item(b, shape, dim)


def _getattr(b: Builder, input: Any, name: str) -> _Shape:
    if name != "shape":
        raise Refusal(f"it reads {name}")
    return _Shape(_value(input).shape)


def _item(b: Builder, input: Any, index: Any) -> Any:
    if not isinstance(input, _Shape) or not isinstance(index, int):
        raise Refusal("it indexes a tensor")
    return (_BatchSize, *input.example)[index]


def _value(input: Any) -> Value:
    if not isinstance(input, Value):
        raise Refusal("it takes something that is not computed from the input by layers")
    return input


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise Refusal(f"an option of it is a {type(value).__name__}, not a number")
    return float(value)


Handler = Callable[..., Any]


def _options(handler: Handler, *names: str) -> Handler:
    """A layer: the function of the same name with the layer's own options."""

    def of_layer(b: Builder, input: Any, *, layer: nn.Module) -> Value:
        return handler(b, input, **{name: getattr(layer, name) for name in names})

    return of_layer


# Exactly these types: a subclass may do something else.
LAYERS: dict[type[nn.Module], Handler] = {
    nn.Linear: _options(_linear, "weight", "bias"),
    nn.ReLU: _options(_relu, "inplace"),
    nn.LeakyReLU: _options(_leaky_relu, "negative_slope", "inplace"),
    nn.ELU: _options(_elu, "alpha", "inplace"),
    nn.GELU: _options(_gelu, "approximate"),
    nn.SiLU: _options(_silu, "inplace"),
    nn.Tanh: _options(_tanh),
    nn.Sigmoid: _options(_sigmoid),
    nn.Softplus: _options(_softplus, "beta", "threshold"),
    nn.Dropout: _options(_dropout, "p", "training"),
    nn.LayerNorm: _options(_layer_norm, "normalized_shape", "weight", "bias", "eps"),
    nn.Flatten: _options(_flatten, "start_dim", "end_dim"),
    nn.Identity: _options(_identity),
}
FUNCTIONS: dict[Callable[..., Any], Handler] = {
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: partial(_relu, inplace=True),
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.gelu: _gelu,
    F.silu: _silu,
    torch.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    F.softplus: _softplus,
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    torch.flatten: _flatten,
    torch.reshape: _reshape_to,
    torch.add: _add,
    operator.add: _add,
    operator.iadd: partial(_add, inplace=True),
    operator.getitem: _item,
    getattr: _getattr,
}
METHODS: dict[str, Handler] = {
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
    "contiguous": _identity,
    "size": _size,
}


def examples_that_fit(trace: Trace) -> tuple[int, ...] | None:
    """The shape of an example that the first layer with a fixed size takes, None without one."""
    for node in trace.graph.nodes:
        layer = trace.attribute(node.target) if node.op == "call_module" else None
        if type(layer) is nn.Linear:
            return (layer.in_features,)
        if type(layer) is nn.LayerNorm:
            return tuple(layer.normalized_shape)
    return None
