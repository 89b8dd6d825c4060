"""What a task's inner step needs of memory, measured once for each kind of task."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.core.random_state import RandomState
from fastmeta.engines.base import Examples
from fastmeta.engines.functional.passes import ModulePasses


class Footprint(NamedTuple):
    """Bytes of one task's inner step.

    Attributes:
        kept: what the graph of the gradient keeps for a product with the Hessian.
        peak: the most at a time, during the gradient and the product.
    """

    kept: int
    peak: int


_known: WeakKeyDictionary[nn.Module, dict[Any, Footprint]] = WeakKeyDictionary()


def footprint(passes: ModulePasses, theta: Tensor, support: Examples) -> Footprint:
    """The footprint of the passes' module on the first task, which runs once by itself.

    Args:
        passes: passes on ``support`` that keep the activations of every step.
        theta: ``[P]`` for all tasks or ``[T, P]``.
        support: examples ``[T, S, ...]``.
    """
    module = passes.task_module.module
    known = _known.setdefault(module, {})
    kind = (module.training, *((t.shape[1:], t.dtype, t.device) for t in (support.x, support.y)))
    if kind not in known:
        known[kind] = _measured(passes, theta, support)
    return known[kind]


def _measured(passes: ModulePasses, theta: Tensor, support: Examples) -> Footprint:
    params = theta.detach().reshape(-1, theta.shape[-1])[:1]
    task = Examples(support.x[:1].detach(), support.y[:1].detach(), support.role)
    # The loop draws its own numbers afterwards, as if nothing had been drawn.
    draws = RandomState(theta.device).replay()
    with draws, torch.no_grad(), passes.conditions(), PeakBytes() as memory:
        grads, product = cast("Any", passes.linearize(0, params, task, set()))
        kept = memory.alive
        product(grads)
    return Footprint(kept, memory.peak)
