"""Checks of the arguments of layers: examples, weights, biases, and options of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastmeta.core.checks import check_integer, is_integer
from fastmeta.ops._checks import check_dims, check_floating, check_shape, check_together

Pair = tuple[int, int]


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, shape: str, weights: str) -> None:
    """Raise unless examples, weights [T, O, ...] and bias [T, O] fit each other.

    One task may come without T. ``shape`` and ``weights`` are written "[T, B, I]", "[T, O, I]".
    """
    for name, tensor, expected in (("x", x, shape), ("weight", weight, weights)):
        check_floating(name, tensor)
        check_dims(name, tensor, expected)
    check_together("weight", weight, "x", x)
    batched = x.dim() == shape.count(",") + 1
    if x.dim() != weight.dim() or (batched and x.shape[0] != weight.shape[0]):
        raise ValueError(
            f"x {shape} and weight {weights}: expected the same T, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is None:
        return
    check_floating("bias", bias)
    check_together("bias", bias, "x", x)
    check_shape("bias", bias, weight.shape[: 2 if batched else 1])


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """(height, width) of ``value``: one number for both, or two."""
    values: Any = (value, value) if is_integer(value) else value
    if not isinstance(values, Sequence) or not all(map(is_integer, values)):
        raise TypeError(f"{name}: expected one or two integers, got {value!r}")
    if len(values) not in (1, 2) or min(values) < least:
        raise ValueError(f"{name}: expected one or two integers of at least {least}, got {value!r}")
    return values[0], values[-1]


def check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    """Raise unless x [T, B, C, H, W], weight [T, O, C / groups, kh, kw] and ``groups`` fit."""
    check_integer("groups", groups, 1)
    channels, outputs = x.shape[2], weight.shape[1]
    if channels % groups or outputs % groups:
        raise ValueError(
            f"groups: expected a divisor of {channels} channels and {outputs} outputs, got {groups}"
        )
    if weight.shape[2] != channels // groups:
        raise ValueError(
            f"weight: expected {channels // groups} channels, C / groups of x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if 0 in x.shape[2:] or 0 in weight.shape[1:]:
        raise ValueError(
            f"x and weight: expected channels, outputs, height and width of at least 1, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )


def padded(
    x: Tensor,
    padding: int | Sequence[int] | str,
    kernel: Sequence[int],
    stride: Pair,
    dilation: Pair,
) -> tuple[Tensor, Pair]:
    """The images, and the zeros to add on each side of them.

    "same" padding of an odd number takes one more zero behind: the images come with it.
    """
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"padding: expected integers, 'same' or 'valid', got {padding!r}")
        return x, pair("padding", padding, 0)
    if stride != (1, 1):
        raise ValueError(f"stride: expected 1 with padding='same', got {stride}")
    high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if high % 2 or wide % 2:
        x = F.pad(x, (0, wide % 2, 0, high % 2))
    return x, (high // 2, wide // 2)
