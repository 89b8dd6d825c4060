"""Shapes, references and assertions that tests in the emulator share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


@contextmanager
def no_fill() -> Iterator[None]:
    """Tensors of gigabytes stay unwritten, so that they take no memory."""
    settings = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def fresh(arguments: tuple) -> tuple:
    """The same, in tensors whose labels no call has checked yet."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


# Of the largest number, an eighth: rounding of float32 sums, once, to half types.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 2**-11 + 2e-6,
    torch.float16: 2**-14 + 2e-6,
}


@dataclass(frozen=True)
class Shape:
    """Images [T, B, H, W, C] and [T, B, H', W', O], weights [T, O, C / groups, kh, kw]."""

    examples: int
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def options(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.outputs, self.channels // self.groups, *self.kernel

    @property
    def out_size(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def inputs(self, tasks: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(tasks, self.examples, *self.size, self.channels, dtype=dtype)

    def gradients(self, tasks: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(tasks, self.examples, *self.out_size, self.outputs, dtype=dtype)

    def weights(self, tasks: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(tasks, *self.weight_size, dtype=dtype)

    def operands(self, to: int, tasks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the map to the outputs (0), the inputs (1), the weights (2), images channels-last."""
        left = self.inputs(tasks, dtype) if to == 0 else self.gradients(tasks, dtype)
        return left, self.inputs(tasks, dtype) if to == 2 else self.weights(tasks, dtype)


SHAPES = {
    "same": Shape(3, 8, 5, (7, 6), padding=(1, 1)),
    "one_channel": Shape(2, 1, 9, (9, 7), padding=(1, 1)),
    "three_channels": Shape(2, 3, 33, (8, 8), padding=(1, 1), stride=(2, 2)),
    "stride": Shape(3, 6, 7, (9, 8), padding=(1, 1), stride=(2, 3)),
    "dilation": Shape(2, 5, 4, (10, 9), padding=(2, 1), dilation=(2, 3)),
    "strided_and_dilated": Shape(2, 4, 3, (11, 10), (2, 3), (2, 2), (1, 2), (3, 2)),
    "pointwise": Shape(2, 20, 70, (4, 5), (1, 1)),
    "pointwise_stride": Shape(2, 20, 6, (5, 7), (1, 1), (2, 2)),
    "tall_kernel": Shape(2, 3, 4, (8, 5), (5, 3), padding=(2, 1)),
    "line": Shape(3, 4, 6, (1, 11), (1, 3), (1, 2), (0, 1)),
    "one_place": Shape(5, 12, 5, (3, 3)),
    "larger_padding": Shape(1, 4, 4, (3, 3), (2, 2), padding=(3, 4)),
    "wide": Shape(2, 12, 68, (9, 9), padding=(1, 1)),
    "depthwise": Shape(3, 5, 5, (6, 7), padding=(1, 1), groups=5),
    "depthwise_doubled": Shape(2, 3, 6, (7, 8), stride=(2, 2), padding=(1, 2), groups=3),
    "depthwise_dilated": Shape(2, 4, 4, (9, 9), (3, 2), dilation=(2, 3), groups=4),
}


@pytest.fixture(autouse=True)
def ieee():
    """Compute in IEEE float32, which is not PyTorch's own setting for convolutions."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = False
    yield
    cudnn.allow_tf32 = before


def first(x: Tensor) -> Tensor:
    """[..., H, W, C] -> [..., C, H, W]"""
    return x.movedim(-1, -3)


def last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1)


def output(shape: Shape, x: Tensor, w: Tensor) -> Tensor:
    pairs = zip(first(x.double()), w.double(), strict=True)
    return last(torch.stack([F.conv2d(x, w, None, *shape.options) for x, w in pairs]))


def gradient_of_input(shape: Shape, dz: Tensor, w: Tensor) -> Tensor:
    size = shape.examples, shape.channels, *shape.size
    pairs = zip(first(dz.double()), w.double(), strict=True)
    return last(torch.stack([conv2d_input(size, w, dz, *shape.options) for dz, w in pairs]))


def gradient_of_weight(shape: Shape, dz: Tensor, x: Tensor) -> Tensor:
    pairs = zip(first(dz.double()), first(x.double()), strict=True)
    size = shape.weight_size
    return torch.stack([conv2d_weight(x, size, dz, *shape.options) for dz, x in pairs])


MAPS = [output, gradient_of_input, gradient_of_weight]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    terms = max(expected.abs().max().item(), 1)
    assert (actual.double() - expected).abs().max() < 8 * tolerance * terms


def rounded_to_tf32(x: Tensor) -> Tensor:
    """10 bits of mantissa, the nearest; ties away from zero."""
    bits = x.view(torch.int32)
    return (bits + 2**12).bitwise_and(~(2**13 - 1)).view(torch.float32)
