"""Hessian-vector products of many tasks at once, with one vector or many, in three modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastmeta.core.checks import check_choice
from fastmeta.core.curvature_products import hessian_products
from fastmeta.core.derivatives import MODES
from fastmeta.core.vmap import differentiable_kernels, map_tasks, under_derivative
from fastmeta.ops._trees import check_scalar, check_trees

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

    - ``reverse``: derivative of ``<grad, v>``. The fastest, and itself differentiable. Many vectors
      share one gradient and its graph; memory grows with their number.
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
        vector: the same tree, shapes and dtypes as ``params``; or many vectors at this point, each
            leaf ``[K, T, ...]``.
        *batch: tensors ``[T, ...]``.
        mode: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.

    Returns:
        The tree of ``H v``, shapes as ``vector``. No tasks give an empty result.

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
    tasks, many = check_trees(params, vector, [("batch", tensor) for tensor in batch])
    if tasks == 0:
        return tree_map(torch.zeros_like, vector)
    scalar_loss = check_scalar(loss_fn, "loss_fn")

    def task_loss(params: Any, *batch: Tensor) -> Tensor:
        return under_derivative(lambda p: scalar_loss(p, *batch), params)

    def total(params: Any) -> Tensor:
        return map_tasks(task_loss, params, *batch).sum()

    with differentiable_kernels():
        return hessian_products(total, params, vector, mode, many)
