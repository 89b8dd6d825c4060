"""Lowering of a module and its loss to the code of a task program, or the reason why not.

A module is traced once (torch.fx). The trace becomes code once for each shape of an example. A
module that a program would not compute exactly has no program.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import shared_parameters
from fastmeta.engines.base import Loss
from fastmeta.engines.program.builder import Builder
from fastmeta.engines.program.layers import HANDLERS, first_that_fits
from fastmeta.engines.program.module_state import hooked, is_torch_layer, module_tables
from fastmeta.engines.program.trace import LoweringError, Trace, WatchedTrace
from fastmeta.ops.task_program.bytecode import LossCode, LossKind, Opcode


class _LossOptions(NamedTuple):
    """Options of a loss besides its reduction, and the loss's name in ``explain``."""

    name: str
    defaults: dict[str, float]


_LOSSES = {
    F.cross_entropy: _LossOptions("cross entropy", {"label_smoothing": 0.0, "ignore_index": -100}),
    F.mse_loss: _LossOptions("mean squared error", {}),
    F.binary_cross_entropy_with_logits: _LossOptions("binary cross entropy with logits", {}),
    F.huber_loss: _LossOptions("Huber loss", {"delta": 1.0}),
    F.smooth_l1_loss: _LossOptions("smooth L1 loss", {"beta": 1.0}),
    F.l1_loss: _LossOptions("L1 loss", {}),
}

# Looked up by exact type: a subclass may compute something else.
_LOSS_MODULES: dict[type[nn.Module], Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.L1Loss: F.l1_loss,
}

_WEIGHTS = ("weight", "pos_weight")  # options of class weights, which programs do not have


@dataclass(frozen=True, eq=False)
class Program:
    """A module and its loss as code, for examples of one shape. Compared by identity.

    Attributes:
        code: int64, in the format of ``fastmeta.ops.task_program.bytecode``.
        layout: layout of the adapted parameters ``[A]``, the first of the arena.
        learned: the parameters of the arena ``[P]``: the adapted ones, then those that the tasks
            share, in the order of the code's offsets.
        shared_names: names of those that the tasks share.
        frozen: frozen parameters and the buffers that the program reads, in the order of the
            code's offsets.
        input_shape, output_shape: shapes of one example.
        activations: number of elements of one example in all values except the input.
        least_examples: smallest batch; 2 if a norm takes statistics over the examples only.
        per_step: whether a norm has parameters for each inner step.
        has_images: whether it has convolutions, norms of channels, or pools.
        has_batch_norm: whether a norm takes statistics of the batch: no example may be absent.
        loss: the loss as code.
        layers: the layers and the loss in words, for ``explain``.
    """

    code: Tensor
    layout: ParameterLayout
    learned: tuple[nn.Parameter, ...]
    shared_names: tuple[str, ...]
    frozen: tuple[Tensor, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activations: int
    least_examples: int
    per_step: bool
    has_images: bool
    has_batch_norm: bool
    loss: LossCode
    layers: tuple[str, ...]

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """The learned parameters that are not adapted, by name."""
        return dict(zip(self.shared_names, self.learned[len(self.layout.names) :], strict=True))

    def by_kind(self, arena: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The adapted part of an arena ``[..., P]``, and the shared parameters' views by name."""
        if not self.shared_names:
            return arena, {}
        shared, size = self.shared, self.layout.numel
        pieces = arena[..., size:].split([p.numel() for p in shared.values()], dim=-1)
        views = {
            name: piece.reshape(*arena.shape[:-1], *parameter.shape)
            for (name, parameter), piece in zip(shared.items(), pieces, strict=True)
        }
        return arena[..., :size], views

    def takes(self, examples: int) -> bool:
        """Whether it takes batches of this many examples, as the module itself does."""
        return examples == 0 or examples >= self.least_examples


class Lowering:
    """The programs of a module and its loss, lowered on first use and then cached.

    They are valid while ``current()`` is true: until layers, parameters, options, flags or hooks of
    the module change, or a global or an attribute of a class that its forward mentions.

    Args:
        module: any module.
        loss: any loss.
        norm_statistics: as in ``FunctionalEngine``.
        adapt: as in ``InnerLoopOptions``.

    Attributes:
        names: the globals and attributes that the forward mentions.

    Example:
        >>> lowering = Lowering(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), F.mse_loss)
        >>> lowering.program((3,)).layers
        ('linear 3 to 2', 'relu', 'mean squared error')
        >>> Lowering(nn.Conv3d(1, 2, 3), F.mse_loss).program((1, 8, 8, 8))
        'model is a Conv3d, which the program does not have yet'
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        norm_statistics: str = "batch",
        adapt: tuple[str, ...] | None = None,
    ) -> None:
        self._module, self._loss = module, loss
        self._options = norm_statistics, adapt
        self._spec, self._loss_name = lower_loss(loss)
        self._programs: dict[tuple[int, ...], Program | str] = {}
        layout, leaves = ParameterLayout.of(module, adapt), tuple(HANDLERS.layers)
        self._watched = WatchedTrace(module, layout, leaves)
        self.names = self._watched.names

    def current(
        self,
        module: nn.Module,
        loss: Loss,
        norm_statistics: str = "batch",
        adapt: tuple[str, ...] | None = None,
    ) -> bool:
        """Whether this lowering is valid for the module and the loss in their present state."""
        if module is not self._module or loss is not self._loss:
            return False
        if (norm_statistics, adapt) != self._options:
            return False
        if not self._watched.is_current():
            return False
        # A function cannot change its options; a loss module or a partial can.
        return type(loss) is FunctionType or lower_loss(loss)[0] == self._spec

    def tables(self) -> list[dict[str, Any]] | None:
        """Dictionaries of the module's and the loss's state, for the fast path to compare.

        The lowering is valid while they hold the same objects, tensors keep shape, dtype and
        device, and ``names`` are unchanged. None if these comparisons are not enough.
        """
        tables = self._watched.snapshot.tables()
        if tables is None or isinstance(self._loss, FunctionType):
            return tables
        if isinstance(self._loss, nn.Module) and is_torch_layer(self._loss):
            return [*tables, *module_tables(self._loss)]
        return None

    def program(self, shape: tuple[int, ...] | None = None) -> Program | str:
        """The program for examples of a shape (None: any that fits), or the reason why not."""
        if isinstance(self._spec, str):
            return self._spec
        trace, spec = self._watched.trace, self._spec
        if isinstance(trace, str):
            return trace
        if shape is None:
            return first_that_fits(trace, lambda shape: self._cached(trace, spec, shape))
        return self._cached(trace, spec, shape)

    def _cached(self, trace: Trace, loss: LossCode, shape: tuple[int, ...]) -> Program | str:
        if shape not in self._programs:
            self._programs[shape] = self._lowered(trace, loss, shape)
        return self._programs[shape]

    def _lowered(self, trace: Trace, loss: LossCode, shape: tuple[int, ...]) -> Program | str:
        try:
            builder = Builder(trace, shape, HANDLERS, self._options[0])
        except LoweringError as error:
            return error.reason
        if not builder.output_adapts:
            return "the outputs of model depend on no adapted parameter"
        output = builder.output.shape
        if loss.kind == LossKind.CROSS_ENTROPY and len(output) != 1:
            return f"cross entropy takes [classes] of an example, and model gives {list(output)}"
        layers = (*builder.layers, self._loss_name)
        code = builder.code(loss)
        return Program(
            code=code.encode(),
            layout=trace.layout,
            learned=tuple(trace.learned),
            shared_names=tuple(shared_parameters(self._module, trace.layout.names)),
            frozen=tuple(builder.frozen),
            input_shape=shape,
            output_shape=output,
            activations=sum(code.values[1:]),
            least_examples=builder.least_examples,
            per_step=builder.per_step,
            # From CONVOLUTION on, opcodes are of images.
            has_images=any(i.opcode >= Opcode.CONVOLUTION for i in code.instructions),
            has_batch_norm=code.has_batch_norm,
            loss=loss,
            layers=layers,
        )


def lower_loss(loss: Loss) -> tuple[LossCode | str, str]:
    """Lower a loss: its code, or the reason why there is none, and its name."""
    try:
        return _lowered_loss(loss)
    except LoweringError as error:
        return f"loss: {error.reason}", ""


def _lowered_loss(loss: Loss) -> tuple[LossCode, str]:
    function, options = _function_and_options(loss)
    spec = _LOSSES.get(function)
    if spec is None:
        name = getattr(function, "__name__", type(function).__name__)
        raise LoweringError(f"it is {name}, which the program does not have yet")
    reduction = options.pop("reduction", "mean")
    if any(options.pop(name, None) is not None for name in _WEIGHTS):
        raise LoweringError(f"the program's {spec.name} has no weights")
    if reduction not in ("mean", "sum") or not set(options) <= set(spec.defaults):
        raise LoweringError(f"the program's {spec.name} does not have these options")
    numbers = {**spec.defaults, **options}
    # Exact types: a tensor or a bool would be frozen into the code as a number.
    if any(type(number) not in (int, float) for number in numbers.values()):
        raise LoweringError(f"the options of {spec.name} are not all numbers")
    return _coded(function, reduction == "mean", **numbers), spec.name


def _coded(
    function: Any,
    mean: bool,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    delta: float = 1.0,
    beta: float = 1.0,
) -> LossCode:
    if function is F.cross_entropy and 0 <= label_smoothing <= 1:
        return LossCode(LossKind.CROSS_ENTROPY, float(label_smoothing), int(ignore_index), mean)
    if function is F.mse_loss:
        return LossCode(LossKind.MSE, mean=mean)
    if function is F.binary_cross_entropy_with_logits:
        return LossCode(LossKind.BCE_WITH_LOGITS, mean=mean)
    if function is F.huber_loss and delta > 0:
        return LossCode(LossKind.HUBER, float(delta), mean=mean)
    if function is F.l1_loss or (function is F.smooth_l1_loss and beta == 0):
        return LossCode(LossKind.L1, mean=mean)
    # Smooth L1 is the Huber loss with delta = beta, divided by beta.
    if function is F.smooth_l1_loss and beta > 0:
        return LossCode(LossKind.HUBER, float(beta), mean=mean, scale=1 / beta)
    raise LoweringError("an option is out of range")


def _function_and_options(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function behind a loss module or a partial, and its options; other losses unchanged."""
    # Positional arguments of a partial would come before the outputs: no known loss does that.
    if type(loss) is functools.partial:
        return (loss.func, dict(loss.keywords)) if not loss.args else (loss, {})
    function = _LOSS_MODULES.get(type(loss))
    if function is None or hooked(loss) or "forward" in loss.__dict__:
        return loss, {}
    names = ("reduction", *_WEIGHTS, *_LOSSES[function].defaults)
    return function, {name: getattr(loss, name) for name in names if hasattr(loss, name)}
