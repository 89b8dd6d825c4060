"""Trees of tensors: their structure, and what becomes of other objects in them."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastmeta.core.trees import (
    called_with,
    check_tree,
    concatenated,
    map_tensors,
    named_tensors,
    split,
)


class Pair(NamedTuple):
    ids: Tensor
    mask: Any


@dataclass(frozen=True)
class Graph:
    nodes: Tensor
    edges: list[Tensor]
    directed: bool = True
    hidden: str = field(default="kept", init=False)


def numbers(count: int) -> list[Tensor]:
    return [torch.tensor([float(i)]) for i in range(count)]


def trees() -> list[Any]:
    a, b, c = numbers(3)
    return [
        a,
        {"x": a, "deep": {"y": [b, (c, None)]}},
        Pair(a, {"m": b}),
        Graph(a, [b, c]),
        [a, 3, "word", True, None, b],
        UserDict(x=a, y=b),
    ]


@pytest.mark.parametrize("tree", trees(), ids=lambda tree: type(tree).__name__)
def test_a_structure_makes_its_tree_again(tree):
    tensors, structure = split(tree)
    again = structure.of(tensors)
    if isinstance(tree, UserDict):
        tree = dict(tree)  # mappings become dicts
    assert type(again) is type(tree)
    assert again == tree or again is tree
    doubled = map_tensors(lambda t: 2 * t, tree)
    assert [t.item() for t in split(doubled)[0]] == [2 * t.item() for t in tensors]
    assert len(structure.paths) == len(set(structure.paths)) == len(tensors)


def test_a_tensor_is_named_by_its_place():
    a, b, c = numbers(3)
    assert list(named_tensors("batch", {"x": a, "deep": [b, Pair(c, None)]})) == [
        "batch['x']",
        "batch['deep'][0]",
        "batch['deep'][1].ids",
    ]
    assert list(named_tensors("x", a)) == ["x"]
    assert list(named_tensors("g", Graph(a, [b]))) == ["g.nodes", "g.edges[0]"]


def test_other_objects_stay_or_become_none():
    thing = object()
    assert split({"x": torch.ones(1), "thing": thing})[1].of([1])["thing"] is thing
    assert split({"x": torch.ones(1), "thing": thing}, others=False)[1].of([1])["thing"] is None


def test_a_function_is_called_with_the_entries():
    def function(x: Tensor, y: Any = 0, z: Any = 0) -> tuple[Any, ...]:
        return x, y, z

    a, b = numbers(2)
    assert called_with(function, a) == (a, 0, 0)
    assert called_with(function, (a, b)) == (a, b, 0)
    assert called_with(function, {"z": b, "x": a}) == (a, 0, b)


def test_trees_are_joined():
    parts = [{"x": torch.full((2, 3), float(i)), "n": 4} for i in range(2)]
    joined = concatenated(parts)
    assert joined["x"].shape == (4, 3)
    assert joined["n"] == 4
    assert concatenated(parts, 1)["x"].shape == (2, 6)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": torch.ones(1), "deep": [object()]}, r"b\['deep'\]\[0\]: expected a tensor, got obj"),
        ({"n": 3}, "b: expected a tensor, got dict"),
        (None, "b: expected a tensor, got NoneType"),
        ([[0, 1]], "b: expected a tensor, got list"),
    ],
)
def test_trees_that_are_none(tree, message):
    with pytest.raises(TypeError, match=message):
        check_tree("b", tree)
