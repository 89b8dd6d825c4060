"""Which trainable parameters an inner loop adapts, and which ones the tasks share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# A name or a pattern of names, a module, or a predicate of a parameter's name and the parameter.
Selector = str | nn.Module | Callable[[str, nn.Parameter], bool]


def selected_names(
    module: nn.Module, adapt: Selector | Sequence[Selector] | None
) -> tuple[str, ...] | None:
    """The names of the trainable parameters that ``adapt`` selects, in the module's order.

    Args:
        module: any module.
        adapt: a name of a parameter, a pattern of names in which ``*`` is any text and ``?`` any
            character, a module (all of its parameters), a predicate ``(name, parameter) -> bool``,
            or a sequence of these, which select together. None: all parameters.

    Returns:
        The first name of each selected parameter; None if all trainable parameters are selected.

    Raises:
        TypeError: a selector of another type.
        ValueError: a selector that selects no trainable parameter, or a parameter registered under
            two names of which only one is selected.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> selected_names(net, "*bias")
        ('0.bias', '2.bias')
        >>> selected_names(net, [net[2]])
        ('2.weight', '2.bias')
    """
    if adapt is None:
        return None
    every = list(module.named_parameters(remove_duplicate=False))
    trainable = [(name, parameter) for name, parameter in every if parameter.requires_grad]
    selected: set[str] = set()
    selectors = adapt if isinstance(adapt, (list, tuple, set, frozenset)) else [adapt]
    for selector in selectors:
        found = _matches(selector, trainable)
        if not found:
            raise ValueError(_nothing_selected(selector, every))
        selected |= found
    if not selected:
        raise ValueError("adapt: expected at least one name, pattern, module or predicate, got []")
    _check_tied(trainable, selected)
    unique = [name for name, p in module.named_parameters() if p.requires_grad]
    names = tuple(name for name in unique if name in selected)
    return None if len(names) == len(unique) else names


def shared_parameters(module: nn.Module, adapt: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The trainable parameters that are not adapted, by name; none if ``adapt`` is None."""
    if adapt is None:
        return {}
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and name not in adapt}


def _matches(selector: Any, trainable: list[tuple[str, nn.Parameter]]) -> set[str]:
    if isinstance(selector, str):
        return {name for name, _ in trainable if fnmatchcase(name, selector)}
    if isinstance(selector, nn.Module):
        own = {id(parameter) for parameter in selector.parameters()}
        return {name for name, parameter in trainable if id(parameter) in own}
    if callable(selector):
        return {name for name, parameter in trainable if selector(name, parameter)}
    raise TypeError(
        f"adapt: expected names, patterns, modules or predicates, got a {type(selector).__name__}"
    )


def _nothing_selected(selector: Any, every: list[tuple[str, nn.Parameter]]) -> str:
    if isinstance(selector, nn.Module):
        what = f"the {type(selector).__name__} given has no trainable parameter of the model"
    elif isinstance(selector, str):
        what = f"{selector!r} matches no trainable parameter"
    else:
        what = "the predicate is true for no trainable parameter"
    frozen = _matches(selector, [(name, p) for name, p in every if not p.requires_grad])
    if frozen:
        return f"adapt: {what}, only parameters with requires_grad=False: {sorted(frozen)}"
    names = [name for name, p in every if p.requires_grad]
    return f"adapt: {what}; the trainable ones are {names}"


def _check_tied(trainable: list[tuple[str, nn.Parameter]], selected: set[str]) -> None:
    names_of: dict[int, list[str]] = {}
    for name, parameter in trainable:
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        within = [name for name in names if name in selected]
        if within and len(within) < len(names):
            without = [name for name in names if name not in selected]
            raise ValueError(
                f"adapt: {within[0]!r} is selected and {without[0]!r} is not, but they are one "
                "tensor (tied weights), which is adapted in both places or in neither"
            )
