"""Conjugate gradients for the linear systems of many tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """An approximate solution x of ``A x = b`` for each task, with A symmetric.

    Hestenes & Stiefel 1952. Starts at 0. A task stops if its residual is 0, or if A is not
    positive along its direction, as a Hessian may be; its x then stays unchanged. If A is not
    positive along the first direction, b, then x is b, as in the truncated method of Steihaug
    1983, and a warning says so.

    Args:
        product: ``A v`` ``[T, P]`` of v ``[T, P]``.
        b: ``[T, P]``.
        iterations: largest number of iterations; P are exact up to rounding.

    Returns:
        x ``[T, P]``; and ``[T, 1]`` bool, whether A is positive along b, so that x is no mere b.

    Warns:
        RuntimeWarning: A is not positive along b in some task.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x, solved = conjugate_gradients(lambda v: v @ a, torch.tensor([[3.0, 4.0]]), 2)
        >>> x.round(decimals=3), solved
        (tensor([[1., 1.]]), tensor([[True]]))
    """
    x, residual, direction = torch.zeros_like(b), b, b
    size = residual.square().sum(1, keepdim=True)
    solvable = torch.ones_like(size, dtype=torch.bool)
    for iteration in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        continues = (curvature > 0) & (size > 0)
        if iteration == 0:
            solvable = ~(curvature <= 0) | (size == 0)
        length = torch.where(continues, size / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = torch.where(continues, residual + size / before * direction, 0.0)
    unsolved = int((~solvable).sum())
    if unsolved:
        warnings.warn(
            f"conjugate gradients: the matrix is not positive along the right-hand side in "
            f"{unsolved} of {len(b)} tasks, whose solution is the right-hand side itself",
            RuntimeWarning,
            stacklevel=2,
        )
    return torch.where(solvable, x, b), solvable
