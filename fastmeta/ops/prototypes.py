"""Class means of support embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.checks import check_integer
from fastmeta.ops import reference
from fastmeta.ops._checks import check_dims, check_floating, check_labels
from fastmeta.ops._registration import as_function, is_native, register


class Prototypes(Function):
    """The linear map x -> means; its transpose is PrototypesBackward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        return torch.ops.fastmeta.prototypes(x, labels, num_classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, labels, ctx.num_classes = inputs
        ctx.save_for_backward(labels)
        ctx.save_for_forward(labels)

    @staticmethod
    def backward(ctx: Any, grad_prototypes: Tensor) -> tuple[Any, ...]:
        return _gather(grad_prototypes, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, *_: Any) -> Tensor:
        return _means(x_dot, *ctx.saved_tensors, ctx.num_classes)


class PrototypesBackward(Function):
    """The linear map means -> x, each example's share; its transpose is Prototypes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_prototypes: Tensor, labels: Tensor) -> Tensor:
        return torch.ops.fastmeta.prototypes_backward(grad_prototypes, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_prototypes, labels = inputs
        ctx.num_classes = grad_prototypes.shape[1]
        ctx.save_for_backward(labels)
        ctx.save_for_forward(labels)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Any, ...]:
        return _means(grad_grad_x, *ctx.saved_tensors, ctx.num_classes), None

    @staticmethod
    def jvp(ctx: Any, grad_dot: Tensor, *_: Any) -> Tensor:
        return _gather(grad_dot, *ctx.saved_tensors)


_means = as_function(Prototypes)
_gather = as_function(PrototypesBackward)

register(
    "prototypes",
    lambda x, labels, num_classes: x.new_empty(x.shape[0], num_classes, x.shape[2]),
)
register(
    "prototypes_backward",
    lambda grad_prototypes, labels: grad_prototypes.new_empty(
        labels.shape[0], labels.shape[1], grad_prototypes.shape[2]
    ),
)


def prototypes(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean support embedding of every class, for every task.

    A class without a support example gets a zero prototype (and no gradient). An example of label
    -1 is absent: it belongs to no class, and its gradient is 0. Differentiable any number of times
    in ``x``; works under torch.func and torch.compile. bfloat16 and float16 are summed in float32.

    Args:
        x: support embeddings [T, S, D], or [S, D] for one task.
        labels: int64 [T, S], or [S], in [0, num_classes), or -1 for an absent example.
        num_classes: N, at least 0.

    Returns:
        [T, N, D], or [N, D].

    Raises:
        TypeError: ``x`` is not floating point, or ``labels`` are not int64.
        ValueError: shapes or devices do not agree, ``num_classes`` is negative, or a label is
            neither in range nor -1 (the message names the first).

    Source: Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equation 1.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.prototypes(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[2.],
                [5.]])
    """
    check_floating("x", x)
    check_dims("x", x, "[T, S, D]")
    check_labels("labels", labels, x.shape[:-1], x.device)
    check_integer("num_classes", num_classes, 0)
    if x.dim() == 2:
        return prototypes(x.unsqueeze(0), labels.unsqueeze(0), num_classes).squeeze(0)
    if is_native("prototypes", x):
        return _means(x, labels, num_classes)
    return reference.prototypes(x, labels, num_classes)
