"""Base of learn2learn's learners: a wrapper that acts as the module that it wraps."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmeta.core.vmap import call_twice_differentiable


class BaseLearner(nn.Module):
    """A wrapper that calls its module, and has the module's attributes besides its own.

    Args:
        module: the wrapped module, available as ``.module``.
    """

    module: Any

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, attr: str) -> Any:
        try:
            return super().__getattr__(attr)
        except AttributeError:
            return getattr(super().__getattr__("module"), attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its current parameters."""
        first = next(self.module.parameters(), None)
        if first is None or first.is_leaf:  # of a clone it has a graph
            return self.module(*args, **kwargs)
        return call_twice_differentiable(self.module, self.module, args, kwargs)
