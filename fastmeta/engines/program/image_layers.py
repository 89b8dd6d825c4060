"""Lowering of layers on images ``[C, H, W]`` and sequences ``[C, L]``, to channels-last memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.engines.program.builder import (
    Builder,
    Handler,
    Value,
    as_number,
    as_value,
    from_layer,
)
from fastmeta.engines.program.trace import LoweringError
from fastmeta.models import PerStepBatchNorm1d, PerStepBatchNorm2d
from fastmeta.ops.task_program.bytecode import Opcode, PoolKind

_EXAMPLES = {1: "[channels, length]", 2: "[channels, height, width]"}

_LIMIT = 2**20  # bound of sizes, as the compiled program checks it

Pair = tuple[int, int]


class _Windows(NamedTuple):
    """Windows over images, each option as (height, width); a sequence is an image of height 1."""

    image: Pair
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def outputs(self) -> Pair:
        """The number of windows along height and width.

        Raises:
            LoweringError: no window fits, or an option is out of range.
        """
        sizes = *self.image, *self.kernel, *self.stride, *self.dilation
        if min(sizes) < 1 or min(self.padding) < 0 or max(*sizes, *self.padding) >= _LIMIT:
            raise LoweringError("a size of it is out of range")
        # The size of a convolution's output, as in the documentation of torch.nn.Conv2d.
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*self, strict=True)
        )
        if min(height, width) < 1:
            raise LoweringError(f"its windows are larger than images of {_by(self.image)}")
        return height, width


def _convolution(
    b: Builder,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    dims: int,
    padding_mode: str = "zeros",
) -> Value:
    x, channels, image = _image(b, input, dims)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 + dims:
        raise LoweringError("its weight is no parameter [outputs, inputs, *kernel]")
    if padding_mode != "zeros":
        raise LoweringError(f"its padding mode is {padding_mode!r}")
    # The compiled program has ordinary and depthwise convolutions, nothing between.
    if groups not in (1, channels):
        raise LoweringError(f"it has {groups} groups of {channels} channels, not 1 or as many")
    outputs, inputs = weight.shape[:2]
    if inputs * groups != channels or outputs % groups != 0:
        raise LoweringError(
            f"it takes {inputs * groups} channels, and examples there have {channels}"
        )
    kernel, strides, dilations = (
        _pair(option, dims) for option in (tuple(weight.shape[2:]), stride, dilation)
    )
    if padding == "same" and strides != (1, 1):
        raise LoweringError("it pads to the same size, and has strides")
    windows = _Windows(
        image=image,
        kernel=kernel,
        stride=strides,
        padding=_padding(padding, kernel, dilations, dims),
        dilation=dilations,
    )
    name = "depthwise convolution" if groups > 1 else "convolution"
    return b.emit(
        Opcode.CONVOLUTION,
        x,
        (outputs, *windows.outputs()[2 - dims :]),
        f"{name} {channels} to {outputs}, {_by(kernel)}",
        weight=b.reference(weight, tuple(weight.shape)),
        bias=b.reference(bias, (outputs,)),
        args=(channels, outputs, *_flat(windows), groups),
    )


def _padding(padding: Any, kernel: Pair, dilation: Pair, dims: int) -> Pair:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding, dims, one=0)
    # Windows that see each pixel need d (k - 1) pixels more, half of them on either side.
    height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if height % 2 or width % 2:
        raise LoweringError("it pads one side more than the other")
    return height // 2, width // 2


def _batch_norm(
    b: Builder,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Value:
    if running_mean is not None or running_var is not None or not training:
        raise LoweringError("it has running statistics, and the program takes only the batch's")
    x = _channelled(b, input)
    # Without positions, one example has a variance of zero; PyTorch raises then.
    if math.prod(x.shape[1:]) == 1:
        b.least_examples = 2
    return _norm(b, x, 0, weight, bias, eps, f"batch norm {x.shape[0]}")


def _batch_norm_layer(b: Builder, input: Any, *, layer: Any, ndims: tuple[int, ...]) -> Value:
    x = as_value(input)
    if len(x.shape) not in ndims:
        raise LoweringError(f"it does not take examples of shape {list(x.shape)}")
    # Without track_running_stats, PyTorch uses statistics that the layer has in eval(), whatever
    # ``norm_statistics`` is, and the functional engine calls PyTorch.
    uses_running = b.norm_statistics == "running" or not layer.track_running_stats
    if uses_running and not layer.training and layer.running_mean is not None:
        return _running_norm(b, x, layer, f"batch norm {layer.num_features}")
    y = _batch_norm(b, x, None, None, layer.weight, layer.bias, True, eps=layer.eps)
    return _tracked(b, y, layer)


def _group_norm(
    b: Builder,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Value:
    x = _channelled(b, input)
    channels, *positions = x.shape
    if num_groups < 1 or channels % num_groups != 0:
        raise LoweringError(f"it has {num_groups} groups, and examples there {channels} channels")
    if channels // num_groups * math.prod(positions) == 1:
        b.least_examples = 2
    return _norm(b, x, num_groups, weight, bias, eps, f"group norm {channels} by {num_groups}")


def _instance_norm_layer(b: Builder, input: Any, *, layer: Any, dims: int) -> Value:
    x, channels, image = _image(b, input, dims)
    name = f"instance norm {channels}"
    uses_running = b.norm_statistics == "running" and not layer.training
    if uses_running and layer.track_running_stats and layer.running_mean is not None:
        return _running_norm(b, x, layer, name)
    if channels != layer.num_features or math.prod(image) == 1:
        raise LoweringError(f"it does not take examples of shape {list(x.shape)}")
    y = _norm(b, x, channels, layer.weight, layer.bias, layer.eps, name)
    return _tracked(b, y, layer)


def _tracked(b: Builder, y: Value, layer: Any) -> Value:
    """Record that a call of the layer changes its running statistics, if it does."""
    if layer.training and layer.track_running_stats:
        b.tracking.append((y.at, layer))
    return y


def _per_step_norm_layer(b: Builder, input: Any, *, layer: Any, ndims: tuple[int, ...]) -> Value:
    x = _channelled(b, input)
    if len(x.shape) not in ndims or x.shape[0] != layer.channels:
        raise LoweringError(f"it does not take examples of shape {list(x.shape)}")
    if math.prod(x.shape[1:]) == 1:
        b.least_examples = 2
    b.per_step = True
    name = f"per-step batch norm {layer.channels}"
    rows = layer.steps + 1  # for theta_0 .. theta_K
    return _norm(b, x, 0, layer.weight, layer.bias, layer.eps, name, rows=rows)


def _running_norm(b: Builder, x: Value, layer: Any, name: str) -> Value:
    x = _channelled(b, x)
    shape = x.shape[:1]
    statistics = b.constant(layer.running_mean, shape), b.constant(layer.running_var, shape)
    name = f"{name} by running statistics"
    return _norm(b, x, 0, layer.weight, layer.bias, layer.eps, name, statistics)


def _norm(
    b: Builder,
    x: Value,
    groups: int,
    weight: Any,
    bias: Any,
    eps: float,
    name: str,
    statistics: Pair = (-1, -1),
    rows: int | None = None,
) -> Value:
    # groups: 0 is a batch norm, ``channels`` an instance norm. statistics: references to a running
    # mean and variance; -1 is none, as of any reference.
    channels = x.shape[0]
    shape = (channels,) if rows is None else (rows, channels)
    return b.emit(
        Opcode.NORM,
        x,
        x.shape,
        name,
        weight=b.reference(weight, shape),
        bias=b.reference(bias, shape),
        args=(channels, groups, as_number(eps), *statistics, rows or 1),
    )


def _max_pool(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    dims: int,
) -> Value:
    if return_indices:
        raise LoweringError("it returns indices")
    if _pair(dilation, dims) != (1, 1):
        raise LoweringError("it is dilated")
    return _pool(
        b,
        input,
        PoolKind.MAX,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        counts_padding=False,
        dims=dims,
    )


def _average_pool(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dims: int,
) -> Value:
    if divisor_override is not None:
        raise LoweringError("it divides by another number than its elements'")
    return _pool(
        b,
        input,
        PoolKind.AVERAGE,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        counts_padding=count_include_pad,
        dims=dims,
    )


def _pool(
    b: Builder,
    input: Any,
    kind: PoolKind,
    *,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    counts_padding: bool,
    dims: int,
) -> Value:
    x, channels, image = _image(b, input, dims)
    if ceil_mode:
        raise LoweringError("it rounds sizes up")
    kernel = _pair(kernel_size, dims)
    strides = _pair(stride, dims) if stride is not None else kernel
    windows = _Windows(image, kernel, strides, _pair(padding, dims, one=0))
    # As PyTorch: a wider padding would leave windows without any element.
    if any(2 * p > k for p, k in zip(windows.padding, kernel, strict=True)):
        raise LoweringError("its padding is more than half of its windows")
    shape = channels, *windows.outputs()[2 - dims :]
    name = f"{kind.name.lower()} pool {_by(kernel)}"
    return _pooled(b, x, kind, windows, counts_padding, shape, name)


def _global_pool(b: Builder, input: Any, output_size: Any, *, dims: int) -> Value:
    if _pair(output_size, dims) != (1, 1):
        raise LoweringError(f"its output size is {output_size}, not 1")
    x, *_ = _image(b, input, dims)
    return mean(b, x, tuple(range(2, 2 + dims)), keepdim=True)


def mean(b: Builder, input: Any, dim: Any = None, keepdim: bool = False) -> Value:
    """Lower a mean over some or all positions of images or sequences to an average pool."""
    x = as_value(input)
    ndim = 1 + len(x.shape)
    listed = dim if isinstance(dim, (tuple, list)) else (dim,)
    dims = {d + ndim if isinstance(d, int) and d < 0 else d for d in listed}
    if ndim not in (3, 4) or len(dims) != len(listed) or not dims <= set(range(2, ndim)):
        raise LoweringError(f"dimensions {dim} of {ndim} are not positions of images")
    x, channels, image = _image(b, x, ndim - 2)
    # Height and width are the last two dimensions; a sequence has the width only.
    height, width = (n if i + ndim - 2 in dims else 1 for i, n in enumerate(image))
    kernel = height, width
    windows = _Windows(image, kernel, kernel)
    kept = channels, *windows.outputs()[4 - ndim :]
    shape = tuple(n for d, n in enumerate(kept, 1) if keepdim or d not in dims)
    name = "global mean" if kernel == image else f"average pool {_by(kernel)}"
    return _pooled(b, x, PoolKind.AVERAGE, windows, False, shape, name)


def _pooled(
    b: Builder,
    x: Value,
    kind: PoolKind,
    windows: _Windows,
    counts_padding: bool,
    shape: tuple[int, ...],
    name: str,
) -> Value:
    sizes = _flat(windows)[:-2]  # pools have no dilation
    return b.emit(Opcode.POOL, x, shape, name, args=(kind, x.shape[0], *sizes, counts_padding))


def _image(b: Builder, input: Any, dims: int) -> tuple[Value, int, Pair]:
    """Return a value as channels-last, its number of channels, and its height and width."""
    x = as_value(input)
    if len(x.shape) != 1 + dims:
        raise LoweringError(
            f"it takes {_EXAMPLES[dims]}, and examples there have shape {list(x.shape)}"
        )
    channels, *positions = x.shape
    return b.channels_last(x), channels, _pair(tuple(positions), dims)


def _channelled(b: Builder, input: Any) -> Value:
    x = as_value(input)
    if not x.shape:
        raise LoweringError("it takes [channels, ...], and examples there have no dimension")
    return b.channels_last(x)


def _pair(option: Any, dims: int, one: int = 1) -> Pair:
    """An option as (height, width); for a sequence the height is ``one``."""
    numbers = option if isinstance(option, (tuple, list)) else (option,)
    # type(), as a bool is an int to isinstance.
    if len(numbers) not in (1, dims) or not all(type(n) is int for n in numbers):
        raise LoweringError(f"an option of it is {option!r}, not {dims} integers")
    return (numbers[0] if dims == 2 else one), numbers[-1]


def _flat(windows: _Windows) -> tuple[int, ...]:
    return tuple(n for pair in windows for n in pair)


def _by(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"


_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")

_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

_AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

LAYERS: dict[type[nn.Module], Handler] = {
    nn.Conv1d: from_layer(partial(_convolution, dims=1), *_CONVOLUTION),
    nn.Conv2d: from_layer(partial(_convolution, dims=2), *_CONVOLUTION),
    nn.BatchNorm1d: partial(_batch_norm_layer, ndims=(1, 2)),
    nn.BatchNorm2d: partial(_batch_norm_layer, ndims=(3,)),
    PerStepBatchNorm1d: partial(_per_step_norm_layer, ndims=(1, 2)),
    PerStepBatchNorm2d: partial(_per_step_norm_layer, ndims=(3,)),
    nn.GroupNorm: from_layer(_group_norm, "num_groups", "weight", "bias", "eps"),
    nn.InstanceNorm1d: partial(_instance_norm_layer, dims=1),
    nn.InstanceNorm2d: partial(_instance_norm_layer, dims=2),
    nn.MaxPool1d: from_layer(partial(_max_pool, dims=1), *_MAX_POOL),
    nn.MaxPool2d: from_layer(partial(_max_pool, dims=2), *_MAX_POOL),
    nn.AvgPool1d: from_layer(partial(_average_pool, dims=1), *_AVERAGE_POOL),
    nn.AvgPool2d: from_layer(partial(_average_pool, dims=2), *_AVERAGE_POOL, "divisor_override"),
    nn.AdaptiveAvgPool1d: from_layer(partial(_global_pool, dims=1), "output_size"),
    nn.AdaptiveAvgPool2d: from_layer(partial(_global_pool, dims=2), "output_size"),
}

FUNCTIONS: dict[Any, Handler] = {
    F.conv1d: partial(_convolution, dims=1),
    F.conv2d: partial(_convolution, dims=2),
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.max_pool1d: partial(_max_pool, dims=1),
    F.max_pool2d: partial(_max_pool, dims=2),
    F.avg_pool1d: partial(_average_pool, dims=1),
    F.avg_pool2d: partial(_average_pool, dims=2),
    F.adaptive_avg_pool1d: partial(_global_pool, dims=1),
    F.adaptive_avg_pool2d: partial(_global_pool, dims=2),
    torch.mean: mean,
}
