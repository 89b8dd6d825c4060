"""Tensors that a value depends on besides the ones that it was computed from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def captured_leaves(value: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that require a gradient and that ``value`` reaches on no way through ``known``.

    Args:
        value: a tensor with its graph, or without one.
        known: leaves, or tensors that were computed, whose own graph is not followed.

    Example:
        >>> import torch
        >>> x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> [leaf is w for leaf in captured_leaves((x * w).sum(), [x])]
        [True]
    """
    known = list(known)
    leaves = {id(tensor) for tensor in known if tensor.grad_fn is None}
    # Nodes are compared as objects, which autograd keeps while one of them is held.
    seen: set[Any] = {tensor.grad_fn for tensor in known}
    found: dict[int, Tensor] = {}
    nodes = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad
        if leaf is not None and id(leaf) not in leaves:
            found[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())
