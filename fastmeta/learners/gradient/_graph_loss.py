"""Each task's query loss on outputs that have a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree, map_tensors
from fastmeta.core.vmap import map_trees
from fastmeta.engines.autograd import entry_point
from fastmeta.engines.base import Engine, Examples, Loss, Minibatches, TaskBatch
from fastmeta.engines.checks import check_examples
from fastmeta.engines.functional.label_checks import with_checked_labels
from fastmeta.engines.functional.task_module import losses_of_examples, scalar_loss
from fastmeta.engines.minibatches import seen_first

REDUCTIONS = ("mean", "none")


@entry_point
def meta_loss_with_graph(
    engine: Engine,
    loss: Loss,
    theta: Tensor | None,
    lr: float | Tensor,
    batch: TaskBatch,
    step_weights: Sequence[float] | Tensor | None,
    batches: Minibatches | None,
    reduction: str,
    differentiable_outputs: bool,
) -> tuple[Tensor, Tree]:
    """``MAML.meta_loss`` without a reduction, or with outputs that have a graph.

    Args:
        engine, loss: of the learner.
        theta, lr, batch, batches: as the engine takes them.
        step_weights: None; anything else raises.
        reduction, differentiable_outputs: as for ``MAML.meta_loss``.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if step_weights is not None:
        raise ValueError(
            "step_weights: expected None with reduction='none' or differentiable_outputs=True, "
            "which are of the parameters after the last step"
        )
    layout = ParameterLayout.of(engine.module, engine.options.adapt)
    check_examples(layout, seen_first(batch.support, batches), batch.query)
    adapted = engine.adapt(theta, lr, batch.support, batches)
    outputs = engine.outputs(adapted, batch.query_x)
    losses = loss_with_graph(loss, outputs, batch.query)
    outputs = outputs if differentiable_outputs else map_tensors(Tensor.detach, outputs)
    return losses if reduction == "none" else losses.mean(), outputs


def loss_with_graph(loss: Loss, outputs: Tree, examples: Examples) -> Tensor:
    """The losses ``[T]`` of outputs ``[T, Q, ...]``, differentiable in them and in the weights."""
    labelled = with_checked_labels(loss, examples.y, examples.y_name)
    checked = scalar_loss(labelled, examples.tasks)
    losses: Tensor
    if examples.weight is None:
        losses = map_trees(checked, outputs, examples.y)
        return losses

    def weighted(outputs: Tree, y: Tree, weight: Tensor) -> Tensor:
        return (losses_of_examples(checked, outputs, y, len(weight)) * weight).sum()

    losses = map_trees(weighted, outputs, examples.y, examples.weight)
    return losses
