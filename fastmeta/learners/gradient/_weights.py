"""Weights of examples, in the form in which engines take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.absence import ABSENT
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import first_tensor
from fastmeta.engines.base import Examples, Minibatches, TaskBatch
from fastmeta.engines.functional.label_checks import every_label
from fastmeta.engines.program.lowering import lower_loss
from fastmeta.ops.task_program.bytecode import LossCode, LossKind


def weighted(
    examples: Examples,
    weight: Tensor | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    layout: ParameterLayout,
    normalize: bool,
    batches: Minibatches | None = None,
) -> Examples:
    """The examples with weights ``[T, B]`` that make up a mean; unchanged for None.

    Examples whose label is -1, or the loss's ``ignore_index``, get weight 0 and a label that the
    loss takes. With ``batches`` the weights are ``[T, K, B]`` and make up a mean over each batch.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    if weight is None:
        return examples
    x, y, role, _ = examples
    name = examples.weight_name
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    dims = 2 if batches is None else batches.leading
    leading = first_tensor(examples.x).shape[:dims]
    if weight.shape != leading:
        raise ValueError(f"{name}: expected shape {list(leading)}, got {list(weight.shape)}")
    spec: Any = lower_loss(loss)[0]
    if isinstance(spec, LossCode) and not spec.mean:
        raise ValueError(
            "loss: expected a mean over the examples, which weights are for, got a sum"
        )
    weight = weight.to(layout.dtype)
    if isinstance(y, Tensor) and not y.is_floating_point():
        absent = y == ABSENT
        if isinstance(spec, LossCode) and spec.kind == LossKind.CROSS_ENTROPY:
            absent = absent | (y == spec.b)
        absent = every_label(absent, dims)
        weight = weight.masked_fill(absent.view(weight.shape), 0.0)
        y = y.masked_fill(absent, 0)
    weight = weight if batches is None else batches.of_weights(weight)
    if normalize:
        total = weight.sum(-1, keepdim=True)
        weight = weight / torch.where(total == 0, 1.0, total)  # without an example the loss is 0
    else:
        weight = weight / weight.shape[-1]
    return Examples(x, y, role, weight)


def batch_of(support: Examples, query: Examples) -> TaskBatch:
    """The two sets as a batch."""
    return TaskBatch(support.x, support.y, query.x, query.y, support.weight, query.weight)
