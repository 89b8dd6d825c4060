"""Convolution with weights of their own for every task."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.ops import reference
from fastmeta.ops._conv_arguments import Pair, check_channels, check_layer, padded, pair
from fastmeta.ops._registration import as_function, folding, is_native, register


class Geometry(NamedTuple):
    """All arguments of a convolution but its tensors; pairs are height and width."""

    size: Pair  # of the images
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


# The three tensors of the trilinear form sum z x w. Two of them give the derivative of the form to
# the third, which is linear in both: a convolution and its two gradients.
_OTHERS = {
    "output": ("input", "weight"),
    "input": ("output", "weight"),
    "weight": ("output", "input"),
}


def _raw(a: Tensor, b: Tensor, bias: Tensor | None, target: str, geometry: Geometry) -> Tensor:
    """``target`` from the two others, in the order of _OTHERS; a bias is for outputs."""
    size, kernel, stride, padding, dilation, groups = geometry
    if target == "output":
        return torch.ops.fastmeta.task_conv2d(a, b, bias, stride, padding, dilation, groups)
    if target == "input":
        return torch.ops.fastmeta.task_conv2d_input(a, b, size, stride, padding, dilation, groups)
    return torch.ops.fastmeta.task_conv2d_weight(a, b, kernel, stride, padding, dilation, groups)


class Convolution(Function):
    """Each of the three maps. Their derivatives of every order are again among the three."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, bias: Tensor | None, target: str, geometry: Geometry
    ) -> Tensor:
        return _raw(a, b, bias, target, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _bias, ctx.target, ctx.geometry = inputs
        ctx.out_shape = output.shape
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # torch.compile has no second derivatives, and loses track of a nested Function.
        contract: Callable[..., Tensor] = _raw if torch.compiler.is_compiling() else _apply
        roles = _OTHERS[ctx.target]
        known = dict(zip(roles, ctx.saved_tensors, strict=True))
        known[ctx.target] = grad  # the cotangent takes the place of the target in the form
        grads = [
            contract(*(known[r] for r in _OTHERS[role]), None, role, ctx.geometry)
            if needed
            else None
            for role, needed in zip(roles, ctx.needs_input_grad, strict=False)
        ]
        bias = grad.sum((1, 3, 4)) if ctx.needs_input_grad[2] else None
        return *grads, bias, None, None

    @staticmethod
    def jvp(ctx: Any, a_dot: Any, b_dot: Any, bias_dot: Any, *_: Any) -> Tensor:
        a, b = ctx.saved_tensors
        terms = []
        if a_dot is not None:
            terms.append(_apply(a_dot, b, None, ctx.target, ctx.geometry))
        if b_dot is not None:
            terms.append(_apply(a, b_dot, None, ctx.target, ctx.geometry))
        if bias_dot is not None:
            terms.append(bias_dot[:, None, :, None, None].expand(ctx.out_shape))
        return functools.reduce(operator.add, terms)


_apply = as_function(Convolution)

# PyTorch's own rule creates a class at every call.
Convolution.vmap = staticmethod(folding(_apply))  # type: ignore[method-assign]


def _images(like: Tensor, *shape: Any) -> Tensor:
    """[T, B, C, H, W] in the memory layout of ``like``."""
    if not reference.is_channels_last(like):
        return like.new_empty(*shape)
    t, b, c, h, w = shape
    return like.new_empty(t, b, h, w, c).permute(0, 1, 4, 2, 3)


register(
    "task_conv2d",
    lambda x, weight, bias, stride, padding, dilation, groups: _images(
        x,
        *x.shape[:2],
        weight.shape[1],
        *reference.conv_out_size(x.shape[3:], weight.shape[3:], stride, padding, dilation),
    ),
)

register(
    "task_conv2d_input",
    lambda grad, weight, size, stride, padding, dilation, groups: _images(
        grad, *grad.shape[:2], weight.shape[2] * groups, *size
    ),
)

register(
    "task_conv2d_weight",
    lambda grad, x, kernel, stride, padding, dilation, groups: x.new_empty(
        x.shape[0], grad.shape[2], x.shape[2] // groups, *kernel
    ),
)


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution (cross-correlation) of each task's images with the task's own weights.

        z[t, b, o, p] = bias[t, o] + sum over channels c and taps k of
                        weight[t, o, c, k] x[t, b, c, p stride - padding + k dilation]

    The same as ``torch.nn.functional.conv2d`` of every task, run together. Differentiable any
    number of times, forward and reverse; works under torch.func and torch.compile. The compiled
    kernels take float32, float64, bfloat16 and float16; half types are summed in float32 and
    rounded once. float32 on CUDA is TF32 if ``torch.backends.cudnn.allow_tf32`` is set. Results
    have the memory format of the images, channels-last (without copies) or contiguous.

    On a CPU, 3 x 3 kernels of stride 1 over many channels, in numbers that fill its vectors, are
    computed by minimal filtering (Lavin, Gray 2016, arXiv 1509.09308): 2.25 times fewer
    multiplications, and rounding errors of the size of plain sums'. A pixel that is not finite then
    reaches all of the 2 x 2 outputs that are computed together.

    Args:
        x: images [T, B, C, H, W], or [B, C, H, W] for one task.
        weight: [T, O, C / groups, kh, kw], or [O, C / groups, kh, kw]; same dtype and device.
        bias: [T, O], or [O], or None.
        stride, dilation: pixels, at least 1; one number, or two for height and width.
        padding: zeros on each side, at least 0, one number or two; or "valid" (none), or "same" (as
            many as keep the size, with stride 1).
        groups: divides C and O; each group of outputs reads its own group of channels.

    Returns:
        [T, B, O, H', W'], or [B, O, H', W'], where
        H' = floor((H + 2 padding - dilation (kh - 1) - 1) / stride) + 1, and W' likewise. T and B
        may be 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype, or an option is not an
            integer.
        ValueError: shapes do not agree, devices differ, an option is out of range, or the kernel is
            larger than the padded images.
        RuntimeError: on CUDA, an image has 2^31 numbers or more.

    Source: Finn, Abbeel, Levine 2017 (arXiv 1703.03400) adapt each task's own weights; Dumoulin,
    Visin 2016 (arXiv 1603.07285) have the arithmetic of sizes.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, weight = torch.randn(4, 10, 3, 8, 8), torch.randn(4, 16, 3, 3, 3)
        >>> fm.task_conv2d(x, weight, padding=1).shape
        torch.Size([4, 10, 16, 8, 8])
    """
    check_layer(x, weight, bias, "[T, B, C, H, W]", "[T, O, C / groups, kh, kw]")
    if x.dim() == 4:
        biases = None if bias is None else bias.unsqueeze(0)
        x, weight = x.unsqueeze(0), weight.unsqueeze(0)
        return task_conv2d(x, weight, biases, stride, padding, dilation, groups).squeeze(0)
    check_channels(x, weight, groups)
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    x, paddings = padded(x, padding, weight.shape[3:], strides, dilations)
    size, kernel = (x.shape[3], x.shape[4]), (weight.shape[3], weight.shape[4])
    if min(reference.conv_out_size(size, kernel, strides, paddings, dilations)) < 1:
        raise ValueError(
            f"x: expected padded images at least as large as the kernel, got {list(x.shape)} with "
            f"padding {paddings} for kernel {kernel} with dilation {dilations}"
        )
    if not is_native("task_conv2d", x):
        return reference.task_conv2d(x, weight, bias, strides, paddings, dilations, groups)
    geometry = Geometry(size, kernel, strides, paddings, dilations, groups)
    if groups in (1, x.shape[2]):
        return _apply(x, weight, bias, "output", geometry)
    return _by_groups(x, weight, bias, geometry)


def _by_groups(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution with each group as a task of its own."""
    groups = geometry.groups
    shares = groups, weight.shape[1] // groups
    images = x.unflatten(2, (groups, -1)).movedim(2, 1).flatten(0, 1)
    weights = weight.unflatten(1, shares).flatten(0, 1)
    biases = None if bias is None else bias.unflatten(1, shares).flatten(0, 1)
    out = _apply(images, weights, biases, "output", geometry._replace(groups=1))
    out = out.unflatten(0, (x.shape[0], groups)).movedim(1, 2)
    # ``flatten`` without the copy may return a view that is not contiguous.
    out = out.clone(memory_format=torch.contiguous_format).flatten(2, 3)
    return reference.as_channels_last(out) if reference.is_channels_last(x) else out
