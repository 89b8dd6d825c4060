"""Batches in the forms that users pass: inputs and targets, or both in one dict or dataclass."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastmeta.core.module_inputs import inputs_of
from fastmeta.core.trees import Tree, entries
from fastmeta.engines.base import Examples


class Sets(NamedTuple):
    """Inputs and targets of support and queries, each a tensor or a tree."""

    support_x: Tree
    support_y: Tree
    query_x: Tree
    query_y: Tree

    @classmethod
    def of(cls, module: nn.Module, first: Tree, second: Tree, query_x: Tree, query_y: Tree) -> Sets:
        """Four arguments, or support and query as the first two.

        Raises:
            TypeError, ValueError: as ``pair_of``.
        """
        if query_x is None and query_y is None:
            return cls(*pair_of(module, "support", first), *pair_of(module, "query", second))
        support = pair_of(module, "support", first, second)
        return cls(*support, *pair_of(module, "query", query_x, query_y))


def pair_of(module: nn.Module, name: str, x: Tree, y: Tree = None) -> tuple[Tree, Tree]:
    """Inputs and targets; without y, of ``x`` as a batch of both.

    Of a dict or a dataclass the module gets the entries that its forward has parameters for, and
    the loss gets all of it; a pair is ``(x, y)``.

    Raises:
        TypeError, ValueError: a batch of another kind.
    """
    if y is not None:
        return inputs_of(module, name, x), y
    if entries(x) is not None:
        return inputs_of(module, name, x), x
    if not isinstance(x, (tuple, list)):
        raise TypeError(
            f"{name}: expected inputs and targets, a pair (x, y), or both in a dict or dataclass, "
            f"got {type(x).__name__}"
        )
    if len(x) != 2:
        raise ValueError(f"{name}: expected a pair (x, y), got {len(x)} entries")
    return inputs_of(module, name, x[0]), x[1]


def examples_of(module: nn.Module, batch: Tree) -> Examples:
    """The examples of a batch of inputs and targets, in neither role.

    Raises:
        TypeError, ValueError: as ``pair_of``.
    """
    return Examples(*pair_of(module, "batch", batch), role="")
