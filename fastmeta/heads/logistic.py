"""Logistic regression on the support."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_integer, check_number
from fastmeta.heads.base import Head, Tasks
from fastmeta.ops.linear_head import linear_head
from fastmeta.ops.task_linear import task_linear

_NEVER = -1e9  # a bias with which a class gets no share of the softmax


class Logistic(Head):
    """Softmax regression by gradient descent from zero: ``fm.linear_head`` on the support.

        W, b <- W, b - lr grad (mean cross entropy + weight_decay / 2 (|W|^2 + |b|^2))

    ``logits = W x_q + b``. Differentiable.

    Args:
        steps: number of steps, at least 0.
        lr: their size. Features of length 1 are stable up to 2.
        weight_decay: factor of the squared length of weights and biases.
        normalize, center: see :class:`Head`.

    Source: Tian et al. 2020 (arXiv 2003.11539), section 3.2: logistic regression on features of
    length 1.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.Logistic(steps=10)
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2)).argmax(-1)
        tensor([0, 1])
    """

    def __init__(
        self,
        steps: int = 100,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        self.steps = steps
        self.lr = check_number("lr", lr)
        self.weight_decay = check_number("weight_decay", weight_decay)

    def _logits(self, tasks: Tasks) -> Tensor:
        count, _, features = tasks.support.shape
        weight = tasks.support.new_zeros(tasks.num_classes, features)
        bias = weight.new_zeros(count, tasks.num_classes)
        if tasks.classes is not None:
            bias = bias.masked_fill(~tasks.classes, _NEVER)
        if tasks.support.shape[1] == 0:
            return task_linear(tasks.query, weight.expand(count, -1, -1), bias)
        adapted = linear_head(
            tasks.support, tasks.labels, weight, bias,
            lr=self.lr, steps=self.steps, weight_decay=self.weight_decay,
        )  # fmt: skip
        return task_linear(tasks.query, *adapted)
