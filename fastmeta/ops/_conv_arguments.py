"""Checks of the arguments of layers: examples, weights, biases, and what a convolution takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.ops._checks import check_dims, check_floating, check_together

Pair = tuple[int, int]


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, shape: str, weights: str) -> None:
    """Examples, weights [T, O, ...] and bias [T, O] of the same tasks; T may be missing."""
    for name, tensor, expected in (("x", x, shape), ("weight", weight, weights)):
        check_floating(name, tensor)
        check_dims(name, tensor, expected)
    check_together("weight", weight, "x", x)
    batched = x.dim() == shape.count(",") + 1
    if x.dim() != weight.dim() or (batched and x.shape[0] != weight.shape[0]):
        raise ValueError(
            f"x {shape} and weight {weights} must agree in T, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is None:
        return
    check_floating("bias", bias)
    check_together("bias", bias, "x", x)
    outputs = weight.shape[: 2 if batched else 1]
    if bias.shape != outputs:
        raise ValueError(f"bias must have shape {list(outputs)}, got {list(bias.shape)}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """One number for both directions, or one for height and one for width."""
    values: Any = (value, value) if _is_integer(value) else value
    if not isinstance(values, Sequence) or not all(map(_is_integer, values)):
        raise TypeError(f"{name} must be an int or two ints, got {value!r}")
    if len(values) not in (1, 2) or min(values) < least:
        raise ValueError(f"{name} must be one or two numbers of at least {least}, got {value!r}")
    return values[0], values[-1]


def check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    """x [T, B, C, H, W] and weight [T, O, C / groups, kh, kw]."""
    if not _is_integer(groups):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    channels, outputs = x.shape[2], weight.shape[1]
    if groups < 1 or channels % groups or outputs % groups:
        raise ValueError(
            f"groups must divide {channels} channels and {outputs} outputs, got {groups}"
        )
    if weight.shape[2] != channels // groups:
        raise ValueError(
            f"weight must have {channels // groups} channels, C / groups of x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if 0 in x.shape[2:] or 0 in weight.shape[1:]:
        raise ValueError(
            f"x and weight must have channels, outputs, height and width of at least 1, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )


def padded(
    x: Tensor,
    padding: int | Sequence[int] | str,
    kernel: Sequence[int],
    stride: Pair,
    dilation: Pair,
) -> tuple[Tensor, Pair]:
    """The zeros on each side of the images; where "same" takes one more behind, x has it."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        return x, pair("padding", padding, 0)
    if stride != (1, 1):
        raise ValueError(f"padding='same' must have stride 1, got {stride}")
    high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if high % 2 or wide % 2:
        x = F.pad(x, (0, wide % 2, 0, high % 2))
    return x, (high // 2, wide // 2)
