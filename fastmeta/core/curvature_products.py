"""Products of a curvature matrix with one vector, or with many vectors at one point.

The matrix is block diagonal, a block for each task: tasks do not mix, so a product with the matrix
of their summed loss is each task's own. Trees of tensors ``[T, ...]`` are points and vectors;
``many`` vectors have one more dimension in front, ``[K, T, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from fastmeta.core.derivatives import central_difference, pullback, tangent


def hessian_products(
    total: Callable[[Any], Tensor], params: Any, vector: Any, mode: str, many: bool = False
) -> Any:
    """``H v`` of the summed loss (Pearlmutter 1994), in the tree of ``vector``.

    Args:
        total: the summed loss of all tasks.
        params: the point, a tree of ``[T, ...]``.
        vector: the same tree, of ``[K, T, ...]`` if there are many.
        mode: as for ``fastmeta.hvp``. In mode reverse many vectors share the gradient's graph.
        many: whether there are many vectors.
    """
    gradient = grad(total)
    if mode == "reverse":
        # The Hessian is symmetric: a pullback of the gradient is a product with it.
        _, product = pullback(gradient, params)
        return _together(product, vector, many)
    along = _along(mode)
    return _one_by_one(lambda v: along(gradient, params, v)[1], vector, many)


def gauss_newton_products(
    outputs_at: Callable[[Any], Tensor],
    total: Callable[[Tensor], Tensor],
    params: Any,
    vector: Any,
    mode: str,
    many: bool = False,
) -> Any:
    """``J' H_L J v`` (Schraudolph 2002), in the tree of ``vector``.

    J is the derivative of the outputs in the parameters, H_L the Hessian of the loss in the
    outputs.

    Args:
        outputs_at: the outputs of all tasks ``[T, ...]`` as a function of the parameters.
        total: the summed loss of all tasks as a function of the outputs.
        params, vector, many: as for ``hessian_products``.
        mode: how ``J v`` is taken: ``"reverse"`` transposes the derivative of the backward pass,
            which is linear; ``"forward"`` is a tangent, and ``"finite_difference"`` a difference of
            outputs.
    """
    outputs, pull = pullback(outputs_at, params)
    _, bend = pullback(grad(total), outputs)
    if mode == "reverse":
        _, push = pullback(pull, torch.zeros_like(outputs))
        return _together(lambda v: pull(bend(push(v))), vector, many)
    along = _along(mode)
    return _one_by_one(lambda v: pull(bend(along(outputs_at, params, v)[1])), vector, many)


def _along(mode: str) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    return tangent if mode == "forward" else central_difference


def _together(product: Callable[[Any], Any], vector: Any, many: bool) -> Any:
    """``product`` of the vector, or of all the vectors at once."""
    if not many:
        return product(vector)
    if len(tree_leaves(vector)[0]) == 0:
        return tree_map(torch.zeros_like, vector)
    return vmap(product)(vector)


def _one_by_one(product: Callable[[Any], Any], vector: Any, many: bool) -> Any:
    """``product`` of the vector, or of one vector after the other: these modes do not nest."""
    if not many:
        return product(vector)
    count = len(tree_leaves(vector)[0])
    if count == 0:
        return tree_map(torch.zeros_like, vector)
    products = [product(tree_map(lambda leaf, k=k: leaf[k], vector)) for k in range(count)]
    return tree_map(lambda *leaves: torch.stack(leaves), *products)
