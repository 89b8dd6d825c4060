"""Checks of trees of parameters and of the vectors that a curvature matrix multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


def check_scalar(loss: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """``loss``, raising ValueError for a value that is no scalar tensor."""

    def checked(*args: Any) -> Tensor:
        value = loss(*args)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a scalar tensor, got {got}")
        return value

    return checked


def check_trees(params: Any, vector: Any, batch: Sequence[tuple[str, Tensor]]) -> tuple[int, bool]:
    """The number of tasks, and whether there are many vectors, after checks.

    Args:
        params: a tree of ``[T, ...]``.
        vector: the same tree and shapes, or ``[K, T, ...]``: many vectors.
        batch: names and tensors ``[T, ...]``.

    Raises:
        TypeError: a leaf or a batch entry that is not a tensor, or dtypes that differ.
        ValueError: trees, shapes, devices or numbers of tasks that do not match.
    """
    leaves, tree = tree_flatten(params)
    directions, vector_tree = tree_flatten(vector)
    if not leaves:
        raise ValueError("params: expected at least one tensor, got an empty tree")
    if tree != vector_tree:
        raise ValueError(f"vector: expected the tree of params, {tree}, got {vector_tree}")
    named = [*(("params", leaf) for leaf in leaves), *(("vector", v) for v in directions), *batch]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected tensors, got {type(tensor).__name__}")
        if tensor.ndim == 0:
            raise ValueError(f"{name}: expected tensors [T, ...], got a scalar")
    many = directions[0].ndim == leaves[0].ndim + 1
    for leaf, direction in zip(leaves, directions, strict=True):
        _check_direction(leaf, direction, len(directions[0]) if many else None)
    tasks = leaves[0].shape[0]
    # One comparison for each tensor: a set of sizes would make torch.compile specialise on them.
    counts = [tensor.shape[0] for tensor in [*leaves, *(tensor for _, tensor in batch)]]
    if any(count != tasks for count in counts):
        names = " and ".join(dict.fromkeys(["params", *(name for name, _ in batch)]))
        raise ValueError(
            f"{names}: expected {tasks} tasks in every tensor, got {sorted(set(counts))}"
        )
    return tasks, many


def _check_direction(leaf: Tensor, direction: Tensor, count: int | None) -> None:
    """Raise unless ``direction`` is like ``leaf``, or like ``count`` of them."""
    shape = leaf.shape if count is None else (count, *leaf.shape)
    if direction.shape != shape:
        many = f" or [K, {', '.join(map(str, leaf.shape))}]" if count is None else ""
        raise ValueError(f"vector: expected shape {list(shape)}{many}, got {list(direction.shape)}")
    if leaf.dtype != direction.dtype:
        raise TypeError(f"vector: expected dtype {leaf.dtype}, got {direction.dtype}")
    if leaf.device != direction.device:
        raise ValueError(f"vector: expected device {leaf.device}, got {direction.device}")
