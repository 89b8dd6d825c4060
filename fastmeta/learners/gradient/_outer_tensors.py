"""The tensors that an inner loop reads besides the module's, and that get a gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from fastmeta.core.parameter_selection import shared_parameters


def outer_tensors(
    losses: Sequence[Any],
    outer: Sequence[Tensor],
    module: nn.Module,
    adapt: Collection[str] | None,
) -> tuple[Tensor, ...]:
    """The parameters of losses that are modules, then ``outer``, each once.

    Parameters that the tasks share are left out: they have their gradient already, and would get
    it twice.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> [t is net.weight for t in outer_tensors([], [net.weight, net.bias], net, ["weight"])]
        [True]
    """
    own = [loss.parameters() for loss in losses if isinstance(loss, nn.Module)]
    found = {id(tensor): tensor for tensors in (*own, outer) for tensor in tensors}
    for parameter in shared_parameters(module, adapt).values():
        found.pop(id(parameter), None)
    return tuple(found.values())
