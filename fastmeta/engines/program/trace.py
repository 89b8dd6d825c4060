"""The calls of a module: a torch.fx trace, with an error if it may depend on the inputs."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.engines.program.module_state import (
    ModuleSnapshot,
    globally_hooked,
    hooked,
    is_torch_layer,
)
from fastmeta.engines.program.names import NamesRead

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
        layout: the layout of its adapted parameters in the arena.
        graph: a call of ``module`` as a submodule, so with the defaults of its forward.
        learned, frozen: the parameters with and without ``requires_grad``. Of the learned ones the
            adapted come first, in the order of ``layout``.

    Args:
        leaves: layers that are calls of the graph, besides PyTorch's own.
        snapshot: the module's state before the trace.
        names: records the names that the trace reads.

    Raises:
        LoweringError: the calls differ between inputs, or other code runs with them.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        leaves: tuple[type[nn.Module], ...],
        snapshot: ModuleSnapshot,
        names: NamesRead,
    ) -> None:
        self.module, self.layout, self._names = module, layout, names
        self._check_modules()
        self.graph = self._traced(_Tracer(leaves, layout.device, snapshot))
        shared = shared_parameters(module, layout.names)
        self.learned = [*map(module.get_parameter, layout.names), *shared.values()]
        self.frozen = [p for p in module.parameters() if not p.requires_grad]
        # A frozen parameter has its own array; as -2 - offset it is told from -1, no parameter.
        offsets = dict(zip(map(id, self.learned), _offsets(self.learned), strict=True))
        frozen = zip(map(id, self.frozen), _offsets(self.frozen), strict=True)
        self._references = offsets | {key: -2 - offset for key, offset in frozen}

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

    def _traced(self, tracer: _Tracer) -> fx.Graph:
        # A trace would freeze random numbers and the branches taken on them.
        generators = torch.get_rng_state(), random.getstate()
        try:
            with _Modes.plain(self.layout.device), self._names.recorded():
                graph = tracer.trace(_Root(self.module))
        except Exception as error:  # anything: a forward is the user's code
            reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
            raise LoweringError(f"torch.fx cannot trace model: {reason}") from error
        if tracer.refusal:
            raise LoweringError(tracer.refusal)
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


class WatchedTrace:
    """The trace of a module, or the reason why there is none, and whether it is still valid.

    Attributes:
        trace: the trace or the reason.
        snapshot: the state of the module.
        names: the globals and attributes that the forward mentions.

    Args:
        module, layout, leaves: as of ``Trace``.
    """

    def __init__(
        self, module: nn.Module, layout: ParameterLayout, leaves: tuple[type[nn.Module], ...]
    ) -> None:
        self.snapshot, self.names = ModuleSnapshot(module), NamesRead()
        self.trace: Trace | str
        try:
            self.trace = Trace(module, layout, leaves, self.snapshot, self.names)
        except LoweringError as error:
            self.trace = error.reason
        # Such a forward changes the state at every call: without this flag a cache would never
        # hit. It has no program anyway.
        self._changing = not self._is_unchanged()
        if self._changing:
            what = "globals that it reads" if self.snapshot.is_unchanged() else "model"
            self.trace = f"the forward of model changes {what}"

    def is_current(self) -> bool:
        """Whether the module, and what its forward reads, is in the state of the trace."""
        return self._changing or self._is_unchanged()

    def _is_unchanged(self) -> bool:
        return self.snapshot.is_unchanged() and self.names.are_unchanged()


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


class _Modes(NamedTuple):
    """The modes of PyTorch that change what a call computes, and that a graph does not record."""

    gradients: bool
    inference: bool
    autocast: bool

    @classmethod
    def now(cls, device: torch.device) -> _Modes:
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device.type),
        )

    @staticmethod
    @contextmanager
    def plain(device: torch.device) -> Iterator[None]:
        """Context of a trace: the modes in which a program computes, whatever the caller's are."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield

    def __str__(self) -> str:
        if self.inference:
            return "in inference mode"
        return "under autocast" if self.autocast else "without gradients"


_PLAIN = _Modes(gradients=True, inference=False, autocast=False)


class _Tracer(fx.Tracer):
    """Tracer that stops at layers with a handler and at torch's own modules.

    Attributes:
        refusal: the reason why the graph does not show what the module computes; empty if it does.
    """

    def __init__(
        self, leaves: tuple[type[nn.Module], ...], device: torch.device, snapshot: ModuleSnapshot
    ) -> None:
        super().__init__()
        self._leaves, self._device, self._snapshot = leaves, device, snapshot
        self.refusal = ""

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        modes = _Modes.now(self._device)
        # Recorded, not raised: the forward may catch any error.
        if modes != _PLAIN:
            self.refusal = f"{caller(node)} computes {modes}"
        # A layer's options and parameters are read after the trace.
        if kind == "call_module" and not self._snapshot.is_unchanged():
            self.refusal = f"the forward of model changes {caller(node)} before it calls it"
        return node

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
