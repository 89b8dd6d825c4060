"""Trees of tensors: nested dicts, lists, tuples and dataclasses, as batches and outputs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tree = Any  # a tensor, or a container of trees and constants

_CONSTANTS = (type(None), bool, int, float, str)


class Structure(NamedTuple):
    """A tree without its tensors.

    Attributes:
        paths: the place of each tensor, as it follows a name: ``""``, ``"['ids']"``, ``"[0]"``.
        build: makes the tree of its tensors, in the order of ``paths``.
    """

    paths: tuple[str, ...]
    build: Callable[[Iterator[Tensor]], Tree]

    def of(self, tensors: Iterable[Tensor]) -> Tree:
        """The tree of these tensors."""
        return self.build(iter(tensors))


class _Container(NamedTuple):
    """The entries of a dict, list, tuple or dataclass, and how to make another one of its kind."""

    paths: Sequence[str]
    entries: Sequence[Tree]
    make: Callable[[list[Tree]], Tree]


_LEAF = Structure(("",), next)


def split(tree: Tree, others: bool = True) -> tuple[list[Tensor], Structure]:
    """The tensors of a tree, and the tree without them.

    Numbers, strings and None are part of the structure; so are other objects, or None in their
    place, as ``others`` says.

    Example:
        >>> import torch
        >>> tensors, structure = split({"x": torch.ones(2), "pair": (torch.zeros(2), True)})
        >>> structure.paths
        ("['x']", "['pair'][0]")
        >>> structure.of([1, 2])
        {'x': 1, 'pair': (2, True)}
    """
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    container = _container(tree)
    if container is None:
        constant = tree if others or isinstance(tree, _CONSTANTS) else None
        return [], Structure((), lambda _: constant)
    parts = [split(entry, others) for entry in container.entries]
    builds, make = [structure.build for _, structure in parts], container.make
    paths = tuple(
        f"{path}{rest}"
        for path, (_, structure) in zip(container.paths, parts, strict=True)
        for rest in structure.paths
    )

    def build(tensors: Iterator[Tensor]) -> Tree:
        return make([part(tensors) for part in builds])

    return [tensor for tensors, _ in parts for tensor in tensors], Structure(paths, build)


def named_tensors(name: str, tree: Tree) -> dict[str, Tensor]:
    """The tensors of a tree by name and place; a tensor by its name."""
    tensors, structure = split(tree)
    return {f"{name}{path}": tensor for path, tensor in zip(structure.paths, tensors, strict=True)}


def map_tensors(fn: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """The tree of ``fn`` of its tensors, and of the ones of other trees of the same structure."""
    if isinstance(tree, Tensor):
        return fn(tree, *others)
    tensors, structure = split(tree)
    rows = zip(tensors, *(split(other)[0] for other in others), strict=True)
    return structure.of(fn(*row) for row in rows)


def concatenated(trees: Sequence[Tree], dim: int = 0) -> Tree:
    """Trees of one structure, joined along a dimension."""
    if len(trees) == 1:
        return trees[0]
    return map_tensors(lambda *parts: torch.cat(parts, dim), *trees)


def first_tensor(tree: Tree) -> Tensor:
    """The first tensor of a tree that has one."""
    return tree if isinstance(tree, Tensor) else split(tree)[0][0]


def is_container(tree: Tree) -> bool:
    """Whether a tree has entries."""
    return _container(tree) is not None


def entries(tree: Tree) -> dict[str, Tree] | None:
    """The entries of a dict or a dataclass by name; None for other trees."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if _is_dataclass(tree):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def called_with(function: Callable[..., Any], arguments: Tree) -> Any:
    """``function`` of one tensor, of a tuple's entries, or of a dict's or dataclass's by name."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    named = entries(arguments)
    return function(*arguments) if named is None else function(**named)


def check_tree(name: str, tree: Tree) -> None:
    """TypeError unless a tree has a tensor, and no leaves but tensors, numbers and strings."""
    if not isinstance(tree, Tensor):
        found = list(_foreign(name, tree))
        if found:
            raise TypeError(f"{found[0][0]}: expected a tensor, got {found[0][1]}")
        if not split(tree)[0]:
            raise TypeError(f"{name}: expected a tensor, got {type(tree).__name__}")


def _foreign(name: str, tree: Tree) -> Iterator[tuple[str, str]]:
    """The leaves that no tree may have: their places, and the names of their classes."""
    container = _container(tree)
    if container is not None:
        for path, entry in zip(container.paths, container.entries, strict=True):
            yield from _foreign(f"{name}{path}", entry)
    elif not isinstance(tree, (Tensor, *_CONSTANTS)):
        yield name, type(tree).__name__


def _container(tree: Tree) -> _Container | None:
    if isinstance(tree, Mapping):
        return _of_mapping(tree)
    if isinstance(tree, (list, tuple)):
        return _of_sequence(tree)
    if _is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree)]
        kind, values = type(tree), [getattr(tree, name) for name in names]
        return _Container(
            [f".{name}" for name in names], values, lambda new: _dataclass(kind, names, new)
        )
    return None


def _of_mapping(tree: Mapping[Any, Tree]) -> _Container:
    keys = list(tree)
    # Outputs of transformers are dicts and dataclasses; other mappings become dicts.
    kind: Any = type(tree) if _is_dataclass(tree) else None

    def make(values: list[Tree]) -> Tree:
        named = dict(zip(keys, values, strict=True))
        return named if kind is None else kind(**named)

    return _Container([f"[{key!r}]" for key in keys], list(tree.values()), make)


def _of_sequence(tree: Sequence[Tree]) -> _Container:
    fields = getattr(type(tree), "_fields", None)
    if fields is not None:
        make: Any = type(tree)._make  # type: ignore[attr-defined]
        return _Container([f".{name}" for name in fields], tree, make)
    kind = list if isinstance(tree, list) else tuple
    return _Container([f"[{i}]" for i in range(len(tree))], tree, kind)


def _is_dataclass(tree: Tree) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _dataclass(kind: type, names: Sequence[str], values: Sequence[Tree]) -> Tree:
    # Not by its constructor, which may take other arguments than its fields, and check them.
    new: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(new, name, value)
    return new
