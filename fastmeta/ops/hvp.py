"""Hessian-vector products of many tasks at once, in three modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils._pytree import tree_flatten, tree_map

from fastmeta.core.checks import check_choice
from fastmeta.core.derivatives import MODES, central_difference, tangent
from fastmeta.core.vmap import differentiable_kernels, map_tasks, under_derivative

Tree = TypeVar("Tree")


@overload
def hvp(
    loss_fn: Callable[..., Tensor],
    params: Tensor,
    vector: Tensor,
    *batch: Tensor,
    mode: str = "reverse",
) -> Tensor: ...


@overload
def hvp(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    vector: Any,
    *batch: Tensor,
    mode: str = "reverse",
) -> Tree: ...


def hvp(
    loss_fn: Callable[..., Tensor],
    params: Any,
    vector: Any,
    *batch: Tensor,
    mode: str = "reverse",
) -> Any:
    """Hessian-vector product ``H v`` of each task's loss (Pearlmutter 1994).

    ``H`` is the Hessian of ``loss_fn`` at ``params``; it is never formed. Tasks are vmapped.

    - ``reverse``: derivative of ``<grad, v>``. The fastest, and itself differentiable.
    - ``forward``: tangent of the gradient. Exact too; keeps no graph of the gradient's graph. Not
      for GRU and LSTM on CUDA, whose cells have no forward derivative in PyTorch.
    - ``finite_difference``: ``(g(theta + e v) - g(theta - e v)) / 2e`` with
      ``e = cbrt(machine epsilon) (1 + |theta|) / |v|`` for each task. The memory of a gradient;
      right to about 1e-9 in float64 and 1e-4 in float32 if the loss is smooth.

    It works inside ``torch.func`` transforms, and its result is differentiable in ``params``,
    ``vector`` and ``batch`` as far as PyTorch has the derivatives. Attention runs on kernels that
    have them; for recurrent layers on CUDA switch cuDNN off (``torch.backends.cudnn.enabled``).

    Args:
        loss_fn: ``loss_fn(params_of_one_task, *batch_of_one_task)`` -> scalar; pure.
        params: a tree (tensor, or dicts, lists and tuples of them) of ``[T, ...]``.
        vector: the same tree, shapes and dtypes as ``params``.
        *batch: tensors ``[T, ...]``.
        mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.

    Returns:
        The tree of ``H v``, shapes as ``params``. No tasks give an empty result.

    Raises:
        TypeError: a leaf or a batch entry that is not a tensor, or dtypes that differ.
        ValueError: an unknown mode, trees, shapes or devices that do not match, different numbers
            of tasks, or a loss that is not a scalar.

    Example:
        >>> import torch
        >>> from fastmeta import hvp
        >>> curvature = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> def loss(theta, a):
        ...     return 0.5 * (a * theta**2).sum()
        >>> hvp(loss, torch.zeros(2, 2), torch.ones(2, 2), curvature)
        tensor([[1., 2.],
                [3., 4.]])
    """
    check_choice("mode", mode, MODES)
    tasks = _check_trees(params, vector, batch)
    if tasks == 0:
        return tree_map(torch.zeros_like, params)

    def scalar_loss(params: Any, *batch: Tensor) -> Tensor:
        value = loss_fn(params, *batch)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss_fn: expected a scalar tensor, got {got}")
        return value

    def task_loss(params: Any, *batch: Tensor) -> Tensor:
        return under_derivative(lambda p: scalar_loss(p, *batch), params)

    def total(params: Any) -> Tensor:
        return map_tasks(task_loss, params, *batch).sum()

    # Tasks do not mix, so the Hessian of the total is block diagonal: one product serves all.
    with differentiable_kernels():
        if mode == "reverse":
            return vjp(grad(total), params)[1](vector)[0]
        if mode == "forward":
            return tangent(grad(total), params, vector)[1]
        return central_difference(grad(total), params, vector)[1]


def _check_trees(params: Any, vector: Any, batch: Sequence[Tensor]) -> int:
    """The number of tasks, after checks of the trees and of their tensors."""
    leaves, tree = tree_flatten(params)
    directions, vector_tree = tree_flatten(vector)
    if not leaves:
        raise ValueError("params: expected at least one tensor, got an empty tree")
    if tree != vector_tree:
        raise ValueError(f"vector: expected the tree of params, {tree}, got {vector_tree}")
    for name, tensors in (("params", leaves), ("vector", directions), ("batch", batch)):
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected tensors, got {type(tensor).__name__}")
            if tensor.ndim == 0:
                raise ValueError(f"{name}: expected tensors [T, ...], got a scalar")
    for leaf, direction in zip(leaves, directions, strict=True):
        if leaf.shape != direction.shape:
            raise ValueError(
                f"vector: expected shape {list(leaf.shape)}, got {list(direction.shape)}"
            )
        if leaf.dtype != direction.dtype:
            raise TypeError(f"vector: expected dtype {leaf.dtype}, got {direction.dtype}")
        if leaf.device != direction.device:
            raise ValueError(f"vector: expected device {leaf.device}, got {direction.device}")
    tasks = leaves[0].shape[0]
    # One comparison for each tensor: a set of sizes would make torch.compile specialise on them.
    counts = [tensor.shape[0] for tensor in [*leaves, *batch]]
    if any(count != tasks for count in counts):
        raise ValueError(
            f"params and batch: expected {tasks} tasks in every tensor, got {sorted(set(counts))}"
        )
    return tasks
