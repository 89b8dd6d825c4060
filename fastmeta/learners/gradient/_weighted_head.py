"""ANIL's meta-loss of weighed examples: an inner loop of the head by the engines."""

from __future__ import annotations

from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.engines.auto import AutoEngine
from fastmeta.engines.base import Examples, InnerLoopOptions, Loss
from fastmeta.engines.task_call import engines_of
from fastmeta.learners.gradient._weights import batch_of, weighted
from fastmeta.rules import SGD


def weighted_head_loss(
    head: nn.Linear,
    loss: Loss,
    support: Examples,
    query: Examples,
    lr: float | Tensor,
    steps: int,
    first_order: bool,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """The mean query loss of the adapted heads, and the detached outputs.

    Args:
        head, loss: of the learner.
        support, query: features ``[T, B, D]`` with targets and weights ``[T, B]`` or None.
        lr: a number, ``[]``, or ``[K]`` for each step.
        steps, first_order, weight_decay: of the inner loop.
    """
    rule = SGD(weight_decay=weight_decay) if weight_decay else None
    options = InnerLoopOptions(steps=steps, first_order=first_order, rule=rule)
    layout = ParameterLayout.of(head)
    if isinstance(lr, Tensor) and lr.ndim == 1:
        lr = lr.view(-1, 1, 1)
    sets = (weighted(e, e.weight, loss, layout, normalize=True) for e in (support, query))
    return AutoEngine(*engines_of(head, loss, options)).meta_loss(None, lr, batch_of(*sets))
