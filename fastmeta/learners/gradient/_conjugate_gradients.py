"""Linear systems of many tasks, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """An approximate solution x of ``A x = b`` for each task, with A symmetric.

    Hestenes & Stiefel 1952. Starts at 0. A task stops where its residual is 0, or where A is not
    positive along its direction, as a Hessian may be: what was found until then stays.

    Args:
        product: ``A v`` ``[T, P]`` of v ``[T, P]``.
        b: ``[T, P]``.
        iterations: at most; P of them are exact but for rounding.

    Returns:
        ``[T, P]``.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradients(lambda v: v @ a, torch.tensor([[3.0, 4.0]]), 2)
        tensor([[1., 1.]])
    """
    x, residual, direction = torch.zeros_like(b), b, b
    size = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        goes_on = (curvature > 0) & (size > 0)
        length = torch.where(goes_on, size / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = torch.where(goes_on, residual + size / before * direction, 0.0)
    return x
