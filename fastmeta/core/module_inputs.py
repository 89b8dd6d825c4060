"""The arguments of a module in a tree of tensors."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from fastmeta.core.checks import check_dense
from fastmeta.core.trees import Tree, check_tree, entries, is_container, named_tensors


def inputs_of(module: nn.Module, name: str, x: Tree) -> Tree:
    """The arguments of a module: of a dict or a dataclass, the entries that its forward takes.

    A tensor that is all that the module takes, as its first argument, stands for itself.

    Raises:
        ValueError: the forward takes no entry.
    """
    if isinstance(x, Tensor) or not is_container(x):
        return x
    named = entries(x)
    if named is None:
        return x[0] if len(x) == 1 and isinstance(x[0], Tensor) else x
    parameters = inspect.signature(module.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken = {key: entry for key, entry in named.items() if key in parameters}
        if not taken:
            raise ValueError(
                f"{name}: expected an entry that {type(module).__name__}.forward takes, "
                f"{', '.join(parameters)}, got {', '.join(map(str, named))}"
            )
        named = taken
    first = next(iter(parameters))
    is_single = list(named) == [first] and isinstance(named[first], Tensor)
    return named[first] if is_single else named


def check_inputs(name: str, x: Tree, tasks: int | None = None) -> None:
    """Raise unless x is a tensor ``[T, B, ...]``, or a tree of tensors ``[T, ...]``.

    Args:
        name: in errors.
        x: the arguments.
        tasks: T; None: any number.
    """
    if is_container(x):
        check_tree(name, x)
        for path, tensor in named_tensors(name, x).items():
            check_dense(path, tensor)
            tasks = len(tensor) if tasks is None and tensor.ndim else tasks
            if tensor.ndim < 1 or len(tensor) != tasks:
                raise ValueError(
                    f"{path}: expected shape [{_size(tasks)}, ...], got {list(tensor.shape)}"
                )
        return
    check_dense(name, x)
    if x.ndim < 2 or (tasks is not None and len(x) != tasks):
        letter = "Q" if name == "query_x" else "B"
        raise ValueError(
            f"{name}: expected shape [{_size(tasks)}, {letter}, ...], got {list(x.shape)}"
        )


def _size(tasks: int | None) -> str:
    return "T" if tasks is None else str(tasks)
