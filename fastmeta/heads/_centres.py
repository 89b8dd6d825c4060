"""Class centres that gradient steps move, by their products with the examples only.

A gradient of a centre c_n is a combination of the examples x_b and of c_n itself, for every metric
here. So centres that start at class means stay combinations ``c_n = sum_b A_nb x_b``, and steps
need only the Gram matrix of the examples: (S + Q)^2 N operations a step for any number of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.heads.base import Tasks
from fastmeta.ops.reference import safe_sqrt

METRICS = ("sqeuclidean", "euclidean", "cosine")
OPTIMIZERS = ("sgd", "adam")

# Gradient of a loss in the scores, from the scores [T, N, B] of support and queries.
ScoreGradient = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """Scores of examples with centres, and what their gradient needs."""

    value: Tensor  # [T, N, B]: minus the distance, or the cosine
    inner: Tensor  # [T, N, B]: factor of the gradient, see centre_gradient
    squares: Tensor  # [T, N, 1], |c_n|^2


def scores_of(metric: str, products: Tensor, squares: Tensor, lengths: Tensor) -> Scores:
    """Scores from the products ``<c_n, x_b>`` ``[T, N, B]``, ``|c_n|^2`` and ``|x_b|^2``."""
    if metric == "cosine":
        inverse = (squares * lengths).clamp(min=_LEAST).rsqrt()
        return Scores(products * inverse, inverse, squares)
    squared = (squares + lengths - 2 * products).clamp(min=0)
    if metric == "sqeuclidean":
        return Scores(-squared, squared, squares)
    distance = safe_sqrt(squared)
    zero = distance == 0
    return Scores(-distance, torch.where(zero, 1.0, distance).reciprocal() * ~zero, squares)


def centre_gradient(metric: str, grad: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Gradient in c_n as ``sum_b rows_nb x_b + own_n c_n``, from ``grad`` in the scores.

    Returns:
        rows ``[T, N, B]`` and own ``[T, N, 1]``.
    """
    if metric == "sqeuclidean":
        rows = 2 * grad
        return rows, -rows.sum(2, keepdim=True)
    rows = grad * scores.inner
    if metric == "euclidean":
        return rows, -rows.sum(2, keepdim=True)
    own = (grad * scores.value).sum(2, keepdim=True) / scores.squares.clamp(min=_LEAST)
    return rows, -own


_LEAST = 1e-24  # the least square of a length that cosines divide by


@dataclass(frozen=True)
class Descent:
    """Gradient steps on the centres.

    Attributes:
        metric: one of METRICS.
        steps: number of steps.
        lr: their size.
        optimizer: "sgd" takes them on the coefficients A; "adam" on the centres themselves, as its
            step is no combination of the examples.
    """

    metric: str
    steps: int
    lr: float
    optimizer: str

    def scores(self, tasks: Tasks, start: Tensor, gradient: ScoreGradient) -> Tensor:
        """Scores ``[T, N, S + Q]`` of support and queries after the steps.

        Args:
            tasks: the examples.
            start: coefficients A ``[T, N, S + Q]`` of the first centres.
            gradient: of the loss in the scores.
        """
        x = tasks.rows
        if self.metric != "cosine" and tasks.origin is not None:
            x = x - tasks.origin
        return (self._dual if self.optimizer == "sgd" else self._primal)(x, start, gradient)

    def _dual(self, x: Tensor, start: Tensor, gradient: ScoreGradient) -> Tensor:
        gram = x @ x.mT
        lengths = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
        coefficients = start
        for step in range(self.steps + 1):
            products = coefficients @ gram
            squares = (coefficients * products).sum(2, keepdim=True)
            scores = scores_of(self.metric, products, squares, lengths)
            if step == self.steps:
                break
            rows, own = centre_gradient(self.metric, gradient(scores.value), scores)
            coefficients = torch.addcmul(coefficients, coefficients, own, value=-self.lr)
            coefficients = torch.sub(coefficients, rows, alpha=self.lr)
        return scores.value

    def _primal(self, x: Tensor, start: Tensor, gradient: ScoreGradient) -> Tensor:
        lengths = x.square().sum(2).unsqueeze(1)
        centres = start @ x
        mean, variance = torch.zeros_like(centres), torch.zeros_like(centres)
        for step in range(self.steps + 1):
            squares = centres.square().sum(2, keepdim=True)
            scores = scores_of(self.metric, centres @ x.mT, squares, lengths)
            if step == self.steps:
                break
            rows, own = centre_gradient(self.metric, gradient(scores.value), scores)
            grad = torch.addcmul(rows @ x, centres, own)
            mean, variance, change = adam(grad, mean, variance, step + 1)
            centres = centres - self.lr * change
        return scores.value


def adam(grad: Tensor, mean: Tensor, variance: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """New moments of Adam (Kingma and Ba 2015, defaults), and the change for a step size of 1."""
    mean = torch.lerp(mean, grad, 1 - _BETA1)
    variance = torch.addcmul(_BETA2 * variance, grad, grad, value=1 - _BETA2)
    root = safe_sqrt(variance) if variance.requires_grad else variance.sqrt()
    root = root / (1 - _BETA2**step) ** 0.5
    return mean, variance, mean / ((root + _EPS) * (1 - _BETA1**step))


_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
