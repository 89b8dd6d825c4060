"""Gauss-Newton-vector products of many tasks at once, with one vector or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastmeta.core.checks import check_choice
from fastmeta.core.curvature_products import gauss_newton_products
from fastmeta.core.derivatives import MODES
from fastmeta.core.vmap import differentiable_kernels, map_tasks, under_derivative
from fastmeta.ops._trees import check_scalar, check_trees

Tree = TypeVar("Tree")


@overload
def ggnvp(
    forward: Callable[[Tensor, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    vector: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    mode: str = "reverse",
) -> Tensor: ...


@overload
def ggnvp(
    forward: Callable[[Any, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    params: Tree,
    vector: Any,
    x: Tensor,
    y: Tensor,
    *,
    mode: str = "reverse",
) -> Tree: ...


def ggnvp(
    forward: Callable[[Any, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    params: Any,
    vector: Any,
    x: Tensor,
    y: Tensor,
    *,
    mode: str = "reverse",
) -> Any:
    """Gauss-Newton-vector product ``J' H_L J v`` of each task's loss (Schraudolph 2002).

    ``J`` is the derivative of the outputs in ``params`` and ``H_L`` the Hessian of the loss in the
    outputs; neither is formed. If the loss is convex in the outputs, as the cross entropy and the
    squared error are, the matrix is positive semidefinite, which conjugate gradients ask for. It is
    the Hessian without the curvature of the network, and equal to it for a linear one. For the
    cross entropy it is the Fisher matrix.

    In mode reverse many vectors share one forward pass. Tasks are vmapped.

    Args:
        forward: ``forward(params_of_one_task, x_of_one_task)`` -> outputs, a tensor; pure.
        loss_fn: ``loss_fn(outputs, y_of_one_task)`` -> scalar; pure.
        params: a tree (tensor, or dicts, lists and tuples of them) of ``[T, ...]``.
        vector: the same tree, shapes and dtypes as ``params``; or many vectors at this point, each
            leaf ``[K, T, ...]``.
        x, y: ``[T, ...]``.
        mode: how ``J v`` is taken. ``"reverse"`` transposes the backward pass, and works wherever
            ``fastmeta.hvp`` does. ``"forward"`` is a tangent of the forward pass, where PyTorch has
            one; ``"finite_difference"`` a difference of outputs, right to about 1e-9 in float64 and
            1e-4 in float32.

    Returns:
        The tree of products, shapes as ``vector``; differentiable in ``params``, ``vector``, ``x``
        and ``y`` as far as PyTorch has the derivatives. No tasks give an empty result.

    Raises:
        TypeError: a leaf, x or y that is not a tensor, outputs that are none, or dtypes that
            differ.
        ValueError: an unknown mode, trees, shapes or devices that do not match, different numbers
            of tasks, or a loss that is not a scalar.

    Example:
        >>> import torch
        >>> from fastmeta import ggnvp
        >>> def forward(theta, x):
        ...     return x @ theta.square()
        >>> def loss(outputs, y):
        ...     return 0.5 * (outputs - y).square().sum()
        >>> x, y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2)
        >>> theta = torch.tensor([[1.0, 1.5]])
        >>> ggnvp(forward, loss, theta, torch.ones(1, 2), x, y)  # J = diag(2, 3), H_L = I
        tensor([[4., 9.]])
    """
    check_choice("mode", mode, MODES)
    tasks, many = check_trees(params, vector, [("x", x), ("y", y)])
    if tasks == 0:
        return tree_map(torch.zeros_like, vector)
    scalar_loss = check_scalar(loss_fn, "loss_fn")

    def one_task(params: Any, x: Tensor) -> Tensor:
        def outputs(params: Any) -> Tensor:
            value = forward(params, x)
            if not isinstance(value, Tensor):
                raise TypeError(f"forward: expected a tensor, got {type(value).__name__}")
            return value

        return under_derivative(outputs, params)

    def outputs_at(params: Any) -> Tensor:
        return map_tasks(one_task, params, x)

    def total(outputs: Tensor) -> Tensor:
        return map_tasks(scalar_loss, outputs, y).sum()

    with differentiable_kernels():
        return gauss_newton_products(outputs_at, total, params, vector, mode, many)
