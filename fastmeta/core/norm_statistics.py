"""Norms that normalise by their batch, whatever running statistics they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tracking_norms(module: nn.Module) -> list[nn.Module]:
    """The batch and instance norms of ``module`` that have running statistics."""
    return [
        m
        for m in module.modules()
        if getattr(m, "track_running_stats", False) and "running_mean" in m._buffers
    ]


@contextmanager
def without_running_statistics(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which ``norms`` take the statistics of their batch, and keep none.

    PyTorch normalises by the batch, in eval() too, if a norm has no statistics.
    """
    with ExitStack() as stack:
        for m in norms:
            none = {name: None for name in RUNNING_STATISTICS if name in m._buffers}
            stack.enter_context(temporarily(m._buffers, none))
            stack.enter_context(temporarily(m.__dict__, {"track_running_stats": False}))
        yield


@contextmanager
def temporarily(namespace: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    """Context in which a table of a module holds ``values``."""
    # In the tables themselves: nn.Module.__setattr__ takes no plain tensor as a parameter.
    before = {name: namespace[name] for name in values}
    namespace.update(values)
    try:
        yield
    finally:
        namespace.update(before)
