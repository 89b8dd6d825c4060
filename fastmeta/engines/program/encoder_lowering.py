"""Lowering of an encoder, whose weights all examples share, to a program without a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.program.builder import Builder
from fastmeta.engines.program.layers import HANDLERS, first_that_fits
from fastmeta.engines.program.trace import LoweringError, WatchedTrace
from fastmeta.ops.task_program.bytecode import Code, Opcode

OWN = "own"  # norm_statistics: as the module's own norms do, running ones updated in train()


@dataclass(frozen=True)
class RunningStatistics:
    """The running statistics of a batch norm, and where its batch's are in the op's result.

    Attributes:
        layer: an ``nn.BatchNorm1d`` or ``nn.BatchNorm2d`` in ``train()``.
        begin: place of the batch's mean ``[C]`` and unbiased variance ``[C]`` behind it.
    """

    layer: Any
    begin: int

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Update them with the statistics ``[S]`` of a batch, as PyTorch does."""
        layer = self.layer
        factor = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(layer.num_batches_tracked)
        if factor is None:  # nothing is counted: PyTorch then keeps them
            factor = 0.0
        mean, variance = statistics[self.begin :].split(layer.num_features)[:2]
        layer.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
        layer.running_var.mul_(1 - factor).add_(variance, alpha=factor)


@dataclass(frozen=True, eq=False)
class EncoderProgram:
    """An encoder as code, for examples of one shape.

    Attributes:
        code: int64, in the format of ``fastmeta.ops.task_program.bytecode``, without a loss.
        learned: the parameters that require a gradient, in the order of the code's offsets.
        frozen: the others, and the buffers that the program reads.
        dtype, device: of all of them, and of the inputs.
        output_shape: of one example.
        least_examples: smallest batch, see ``Program``.
        has_batch_norm: whether a norm takes statistics of the batch.
        running: the running statistics that a call updates.
        layers: the layers in words.
    """

    code: Tensor
    learned: tuple[nn.Parameter, ...]
    frozen: tuple[Tensor, ...]
    dtype: torch.dtype
    device: torch.device
    output_shape: tuple[int, ...]
    least_examples: int
    has_batch_norm: bool
    running: tuple[RunningStatistics, ...]
    layers: tuple[str, ...]


class EncoderLowering:
    """The programs of an encoder, lowered on first use and then cached.

    Args:
        encoder: any module.
        norm_statistics: ``"own"``, or ``"batch"`` or ``"running"`` as in ``FunctionalEngine``,
            with which running statistics are not updated.

    Example:
        >>> lowering = EncoderLowering(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
        >>> lowering.program((1, 5, 5)).layers
        ('convolution 1 to 2, 3x3', 'relu', 'channels first')
        >>> EncoderLowering(nn.Conv3d(1, 2, 3)).program((1, 8, 8, 8))
        'model is a Conv3d, which the program does not have yet'
    """

    def __init__(self, encoder: nn.Module, norm_statistics: str = OWN) -> None:
        self.encoder = encoder
        self._norm_statistics = norm_statistics
        self._programs: dict[tuple[int, ...], EncoderProgram | str] = {}
        layout = _layout(encoder)
        self._watched = WatchedTrace(encoder, layout, tuple(HANDLERS.layers))

    def is_current(self) -> bool:
        """Whether this lowering is valid for the encoder in its present state."""
        return self._watched.is_current()

    def program(self, shape: tuple[int, ...]) -> EncoderProgram | str:
        """The program for examples of a shape, or the reason why there is none."""
        if shape not in self._programs:
            try:
                self._programs[shape] = self._lowered(shape)
            except LoweringError as error:
                self._programs[shape] = error.reason
        return self._programs[shape]

    def fitting(self) -> EncoderProgram | str:
        """The program for some shape of an example that fits, or the reason why there is none."""
        trace = self._watched.trace
        return trace if isinstance(trace, str) else first_that_fits(trace, self.program)

    def _lowered(self, shape: tuple[int, ...]) -> EncoderProgram:
        trace = self._watched.trace
        if isinstance(trace, str):
            raise LoweringError(trace)
        own = self._norm_statistics == OWN
        # A module's own norms use running statistics in eval(), and the batch's in train().
        builder = Builder(trace, shape, HANDLERS, "running" if own else self._norm_statistics)
        code = builder.code(None)
        if builder.per_step:
            raise LoweringError("a norm of model has parameters for each inner step")
        if all(i.opcode != Opcode.CONVOLUTION for i in code.instructions):
            raise LoweringError("it has no convolutions, and PyTorch is as fast for the rest")
        return EncoderProgram(
            code=code.encode(),
            learned=tuple(trace.learned),
            frozen=tuple(builder.frozen),
            dtype=trace.layout.dtype,
            device=trace.layout.device,
            output_shape=builder.output.shape,
            least_examples=builder.least_examples,
            has_batch_norm=code.has_batch_norm,
            running=_running(builder, code) if own else (),
            layers=tuple(builder.layers),
        )


def _layout(encoder: nn.Module) -> ParameterLayout:
    """The layout of the trainable parameters, of which there may be none.

    Raises:
        LoweringError: the encoder has no parameters, or trainable ones of several kinds.
    """
    first = next(encoder.parameters(), None)
    if first is None:
        raise LoweringError("model has no parameters")
    if not any(p.requires_grad for p in encoder.parameters()):
        return ParameterLayout((), (), first.dtype, first.device)
    try:
        return ParameterLayout.of(encoder)
    except (TypeError, ValueError) as error:
        raise LoweringError(str(error)) from error


def _running(builder: Builder, code: Code) -> tuple[RunningStatistics, ...]:
    """The running statistics that a call updates, in the order of their layers."""
    places = _statistics_places(code)
    running = []
    for value, layer in builder.tracking:
        name = type(layer).__name__
        if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            raise LoweringError(f"the running statistics of a {name} are not updated")
        if value not in places:
            raise LoweringError(f"a {name} has running statistics, and nothing reads its output")
        for buffer in (layer.running_mean, layer.running_var):
            builder.constant(buffer, (layer.num_features,))  # checks that it is a plain tensor
        running.append(RunningStatistics(layer, places[value]))
    return tuple(running)


def _statistics_places(code: Code) -> dict[int, int]:
    """Output of each batch norm that the program runs -> the place of its statistics."""
    used = {code.output}
    for i in reversed(code.instructions):
        if i.y in used:
            used |= {i.x, i.x2}
    places, begin = {}, 0
    for i in code.instructions:
        if i.y in used and i.opcode == Opcode.NORM:
            channels, groups, _, mean, *_ = i.args
            if groups == 0 and mean == -1:
                places[i.y] = begin
                begin += 2 * channels
    return places
