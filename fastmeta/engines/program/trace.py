"""The calls of a module: a torch.fx trace, with an error if it may depend on the inputs."""

from __future__ import annotations

import itertools
import operator
import random
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.program.module_state import globally_hooked, hooked, is_torch_layer

_DTYPES = (torch.float32, torch.float64)

_MODULE = "module"


class LoweringError(ValueError):
    """Raised for a module, a loss or a batch that has no task program.

    Attributes:
        reason: the reason in words for the user.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"there is no task program: {reason}")
        self.reason = reason


class Trace:
    """The calls of a module, valid for all inputs while the module does not change.

    Attributes:
        module: the module that was traced.
        layout: the layout of its parameters in the arena.
        graph: a call of ``module`` as a submodule, so with the defaults of its forward.
        adapted, frozen: the parameters with and without ``requires_grad``.

    Raises:
        LoweringError: the calls differ between inputs, or other code runs with them.
    """

    def __init__(
        self, module: nn.Module, layout: ParameterLayout, leaves: tuple[type[nn.Module], ...]
    ) -> None:
        self.module, self.layout = module, layout
        self._check_modules()
        self.graph = self._traced(leaves)
        self.adapted = [p for p in module.parameters() if p.requires_grad]
        self.frozen = [p for p in module.parameters() if not p.requires_grad]
        # A frozen parameter has its own array; as -2 - offset it is told from -1, no parameter.
        offsets = dict(zip(map(id, self.adapted), _offsets(self.adapted), strict=True))
        shared = zip(map(id, self.frozen), _offsets(self.frozen), strict=True)
        self._references = offsets | {key: -2 - offset for key, offset in shared}

    def reference(self, parameter: Tensor) -> int:
        """The number by which an instruction refers to a parameter: its offset in the arena.

        A frozen parameter has ``-2 - offset``.
        """
        if id(parameter) not in self._references:
            raise LoweringError("it uses a parameter that model does not own")
        return self._references[id(parameter)]

    def attribute(self, target: str) -> Any:
        """The layer or parameter to which a node of the graph refers."""
        value: Any = self.module
        for name in target.split(".")[1:]:  # the first is _Root's own attribute
            value = getattr(value, name)
        return value

    def _traced(self, leaves: tuple[type[nn.Module], ...]) -> fx.Graph:
        # A trace would freeze random numbers and the branches taken on them.
        generators = torch.get_rng_state(), random.getstate()
        try:
            graph = _Tracer(leaves).trace(_Root(self.module))
        except Exception as error:  # anything: a forward is the user's code
            message = error.reason if isinstance(error, LoweringError) else str(error)
            reason = message.partition("\n")[0].rstrip(".") or type(error).__name__
            raise LoweringError(f"torch.fx cannot trace model: {reason}") from error
        drawn = not torch.equal(generators[0], torch.get_rng_state())
        if drawn or generators[1] != random.getstate():
            raise LoweringError("the forward of model draws random numbers")
        return graph

    def _check_modules(self) -> None:
        if self.layout.dtype not in _DTYPES:
            raise LoweringError(f"the parameters are {self.layout.dtype}, not float32 or float64")
        # Hooks run code around the calls that the trace does not see.
        if globally_hooked():
            raise LoweringError("there are hooks on the calls of every module")
        for name, m in self.module.named_modules():
            if hooked(m):
                raise LoweringError(f"{path(name)} has hooks")
            if "forward" in m.__dict__ or m.__dict__.get("_compiled_call_impl") is not None:
                raise LoweringError(f"{path(name)} is compiled, or its forward was replaced")
            # The handlers of torch's own layers read their buffers, or raise.
            if m._buffers and not is_torch_layer(m):
                raise LoweringError(f"{path(name)} has buffers, which the program does not follow")
        for name, p in self.module.named_parameters():
            # A subclass (lazy, quantised, sharded) may not own plain memory.
            if type(p) is not nn.Parameter:
                raise LoweringError(f"parameter {name!r} is a {type(p).__name__}")
            if (p.dtype, p.device) != (self.layout.dtype, self.layout.device):
                raise LoweringError(
                    f"parameter {name!r} is {p.dtype} on {p.device}, unlike the others"
                )


def _offsets(parameters: list[nn.Parameter]) -> list[int]:
    ends = list(itertools.accumulate(p.numel() for p in parameters))
    return [0, *ends[:-1]] if ends else []


def path(name: str) -> str:
    """The name of a submodule as users write it."""
    return f"model.{name}" if name else "model"


def caller(node: fx.Node) -> str:
    """The module whose forward makes the call of a node."""
    target = node.target
    if node.op != "call_module":
        target = next(reversed(node.meta.get("nn_module_stack", {_MODULE: None})))
    return path(str(target).removeprefix(_MODULE).removeprefix("."))


class _Proxy(fx.Proxy):
    """Records ``x += y`` as in-place addition; fx by itself records ``x + y``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Tracer that stops at layers with a handler and at torch's own modules."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = leaves

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, self._leaves):
            return True
        # Sequential is traced through: it only calls its layers.
        return is_torch_layer(module) and type(module) is not nn.Sequential


class _Root(nn.Module):
    """Calls the module as a submodule: fx then traces its call, and names it in every node."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        setattr(self, _MODULE, module)

    module: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)
