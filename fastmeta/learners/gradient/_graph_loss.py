"""Each task's query loss on outputs that have a graph."""

from __future__ import annotations

from torch import Tensor
from torch.func import vmap

from fastmeta.core.vmap import map_tasks
from fastmeta.engines.base import Examples, Loss
from fastmeta.engines.functional.label_checks import with_checked_labels
from fastmeta.engines.functional.task_module import scalar_loss

REDUCTIONS = ("mean", "none")


def loss_with_graph(loss: Loss, outputs: Tensor, examples: Examples) -> Tensor:
    """The losses ``[T]`` of outputs ``[T, Q, ...]``, differentiable in them and in the weights."""
    labelled = with_checked_labels(loss, examples.y, examples.y_name)
    checked = scalar_loss(labelled, len(outputs))
    losses: Tensor
    if examples.weight is None:
        losses = map_tasks(checked, outputs, examples.y)
        return losses

    def weighted(outputs: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        each = vmap(lambda z, y: checked(z.unsqueeze(0), y.unsqueeze(0)))(outputs, y)
        return (each * weight).sum()

    losses = map_tasks(weighted, outputs, examples.y, examples.weight)
    return losses
