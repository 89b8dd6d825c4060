"""Builder of a task program's instructions from a trace: one handler a layer or function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastmeta.engines.program.trace import LoweringError, Trace, caller
from fastmeta.ops.task_program.bytecode import Code, Instruction, LossCode, Opcode


class Value(NamedTuple):
    """A value of the program: its number, and the shape of one example as the module sees it.

    If ``channels_last``, the shape ``[C, ...]`` is stored as ``[..., C]``.
    """

    at: int
    shape: tuple[int, ...]
    channels_last: bool = False


class BatchSize:
    """Placeholder for the number of examples, which a forward reads off a shape."""


class Shape(NamedTuple):
    """The shape of a value with its batch size, as a forward reads it."""

    example: tuple[int, ...]


Handler = Callable[..., Any]


class Handlers(NamedTuple):
    """Tables of handlers, which emit the instructions of a call.

    A handler takes the builder and the arguments of the call. A layer's handler also takes
    ``layer``.
    """

    layers: Mapping[type[nn.Module], Handler]
    functions: Mapping[Callable[..., Any], Handler]
    methods: Mapping[str, Handler]


class Builder:
    """Emits the instructions of a trace for one shape of an example.

    Raises:
        LoweringError: naming the module or function that a program does not have.
    """

    def __init__(
        self,
        trace: Trace,
        shape: tuple[int, ...],
        handlers: Handlers,
        norm_statistics: str = "batch",
    ) -> None:
        self.trace = trace
        self.norm_statistics = norm_statistics
        self.frozen: list[Tensor] = list(trace.frozen)  # then the buffers that are read
        self.layers: list[str] = []
        self.per_step = False  # whether a norm has parameters for each inner step
        self.least_examples = 1  # of a batch; 2 if a norm's statistics are over examples only
        # Layers whose call changes their running statistics, and the values that they make.
        self.tracking: list[tuple[int, nn.Module]] = []
        self._handlers = handlers
        self._sizes = [math.prod(shape)]  # elements of each value; value 0 is the input
        self._instructions: list[Instruction] = []
        self._overwritten: list[tuple[int, int]] = []  # value, the instruction in place
        self._adapts: set[int] = set()  # values that depend on adapted parameters
        self._learned = sum(parameter.numel() for parameter in trace.learned)
        self._transposed: dict[tuple[int, int, int], int] = {}  # (value, rows, columns) -> value
        self._sources: dict[int, int] = {}  # transpose -> the value that it transposes
        self.output = self._run(Value(0, shape))
        self._check_overwritten()
        if 0 in self._sizes:
            raise LoweringError("a tensor of model has no elements")

    @property
    def output_adapts(self) -> bool:
        """Whether the outputs depend on adapted parameters."""
        return self.output.at in self._adapts

    def code(self, loss: LossCode | None) -> Code:
        """The instructions and the loss as code."""
        return Code(
            values=tuple(self._sizes),
            instructions=tuple(self._instructions),
            parameters=self._learned,
            frozen=sum(tensor.numel() for tensor in self.frozen),
            output=self.output.at,
            loss=loss,
            shared=self._learned - self.trace.layout.numel,
        )

    def emit(
        self, opcode: Opcode, x: Value, shape: tuple[int, ...], name: str, **fields: Any
    ) -> Value:
        """Emit an instruction on x; the new value has the memory layout of x."""
        y = Value(len(self._sizes), shape, x.channels_last)
        instruction = Instruction(opcode, x.at, y.at, **fields)
        # Offsets from 0 up are learned parameters, first the adapted; frozen ones are below -1.
        parameters, adapted = (instruction.weight, instruction.bias), self.trace.layout.numel
        has_adapted = any(0 <= parameter < adapted for parameter in parameters)
        if has_adapted or self._adapts & {x.at, instruction.x2}:
            self._adapts.add(y.at)
        self._sizes.append(math.prod(shape))
        self._instructions.append(instruction)
        if name:  # a part of a layer has none
            self.layers.append(name)
        return y

    def channels_last(self, x: Value) -> Value:
        """x with its channels last in memory, as image layers compute."""
        return self._in_layout(x, channels_last=True)

    def channels_first(self, x: Value) -> Value:
        """x with its channels first in memory, as the module sees it."""
        return self._in_layout(x, channels_last=False)

    def overwrite(self, x: Value) -> None:
        """Record that the next instruction works in place on ``x``."""
        self._overwritten.append((x.at, len(self._instructions)))

    def reference(self, tensor: Any, shape: tuple[int, ...]) -> int:
        """The number by which an instruction refers to a weight or bias, as ``Trace.reference``."""
        if tensor is None:
            return -1  # none, as the code writes it
        if not isinstance(tensor, nn.Parameter):
            raise LoweringError("a weight or bias of it is no parameter")
        if tensor.shape != shape:
            raise LoweringError(
                f"a parameter of it has shape {list(tensor.shape)}, not {list(shape)}"
            )
        return self.trace.reference(tensor)

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros in the parameters' dtype, on their device, for ``constant``."""
        layout = self.trace.layout
        return torch.zeros(shape, dtype=layout.dtype, device=layout.device)

    def constant(self, buffer: Any, shape: tuple[int, ...]) -> int:
        """The number by which an instruction refers to a buffer, which joins ``frozen``."""
        layout = self.trace.layout
        if type(buffer) is not Tensor or buffer.requires_grad:
            raise LoweringError("a buffer of it is no plain tensor, or requires a gradient")
        if (buffer.dtype, buffer.device) != (layout.dtype, layout.device):
            kind = f"{buffer.dtype} on {buffer.device}"
            raise LoweringError(f"a buffer of it is {kind}, unlike the parameters")
        if buffer.shape != shape:
            raise LoweringError(f"a buffer of it has shape {list(buffer.shape)}, not {list(shape)}")
        # A layer called twice reads its buffer from one place.
        offset = 0
        for tensor in self.frozen:
            if tensor is buffer:
                return -2 - offset
            offset += tensor.numel()
        self.frozen.append(buffer)
        return -2 - offset

    def _in_layout(self, x: Value, channels_last: bool) -> Value:
        channels, *positions = x.shape or (1,)
        count = math.prod(positions)
        # With one channel or one position both layouts are the same memory.
        if x.channels_last == channels_last or channels == 1 or count == 1:
            return x._replace(channels_last=channels_last)
        rows, columns = (channels, count) if channels_last else (count, channels)
        # A value is transposed once, and the transpose of a transpose is the value itself.
        at = self._transposed.get((x.at, rows, columns))
        if at is None:
            name = "channels last" if channels_last else "channels first"
            at = self.emit(Opcode.TRANSPOSE, x, x.shape, name, args=(rows, columns)).at
            self._transposed[x.at, rows, columns] = at
            self._transposed[at, columns, rows] = x.at
            self._sources[at] = self._source(x.at)
        return Value(at, x.shape, channels_last)

    def _source(self, value: int) -> int:
        """The value that this one transposes; itself if it is no transpose."""
        return self._sources.get(value, value)

    def _run(self, x: Value) -> Value:
        """Emit the instructions of all nodes of the trace; returns the output."""
        results: dict[fx.Node, Any] = {}
        for node in self.trace.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
            if node.op == "placeholder":
                results[node] = x
            elif node.op == "get_attr":
                results[node] = self.trace.attribute(node.target)
            elif node.op != "output":
                results[node] = self._call(node, args, kwargs)
        (output,) = args  # the last node is the output
        if not isinstance(output, Value):
            raise LoweringError("model does not return one tensor that comes from its input")
        if not self._instructions:
            raise LoweringError("model has no layers")
        return self.channels_first(output)

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, handlers = caller(node), self._handlers
        target: Any = node.target
        handler: Handler | None
        if node.op == "call_module":
            layer = self.trace.attribute(target)
            what, of_layer = f"is a {type(layer).__name__}", handlers.layers.get(type(layer))
            handler = of_layer and partial(of_layer, layer=layer)
        else:
            name = getattr(target, "__name__", target)
            table: Mapping[Any, Handler]
            table = handlers.methods if node.op == "call_method" else handlers.functions
            what, handler = f"calls {name}", table.get(target)
        if handler is None:
            raise LoweringError(f"{where} {what}, which the program does not have yet")
        # Bound first, so that a TypeError from inside a handler is not taken for an option.
        try:
            inspect.signature(handler).bind(self, *args, **kwargs)
        except TypeError as error:
            raise LoweringError(f"{where} {what} with unknown options: {error}") from error
        try:
            return handler(self, *args, **kwargs)
        except LoweringError as error:
            raise LoweringError(f"{where} {what}: {error.reason}") from None

    def _check_overwritten(self) -> None:
        # In the module a value and its transposes are one tensor: writing one changes them all.
        # The program has no in-place ops, so such a write must be seen by nothing else.
        read = [
            {self._source(ins.x), self._source(ins.x2)} if ins.opcode != Opcode.TRANSPOSE else set()
            for ins in self._instructions
        ]
        for at, writer in self._overwritten:
            value = self._source(at)
            readers = [i for i, values in enumerate(read) if value in values]
            if value in (0, self._source(self.output.at)) or readers != [writer]:
                raise LoweringError(
                    f"{self.layers[writer]} works in place on a tensor that is used elsewhere"
                )


def from_layer(handler: Handler, *names: str) -> Handler:
    """Make a layer's handler: the function's handler, with the layer's attributes as options."""

    def of_layer(b: Builder, input: Any, *, layer: nn.Module) -> Value:
        return handler(b, input, **{name: getattr(layer, name) for name in names})

    return of_layer


def as_value(input: Any) -> Value:
    """The argument as a value; LoweringError if it is not computed from the input."""
    if not isinstance(input, Value):
        raise LoweringError("it takes something that is not computed from the input by layers")
    return input


def as_number(value: Any) -> float:
    """The option as a float; LoweringError if it is no number."""
    if not isinstance(value, (int, float)):
        raise LoweringError(f"an option of it is a {type(value).__name__}, not a number")
    return float(value)
