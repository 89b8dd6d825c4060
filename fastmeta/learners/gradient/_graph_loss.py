"""Each task's query loss on outputs that have a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta.core.checks import check_choice
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.trees import Tree, map_tensors
from fastmeta.engines.autograd import entry_point
from fastmeta.engines.base import Engine, Loss, Minibatches, TaskBatch
from fastmeta.engines.checks import check_examples
from fastmeta.engines.functional.label_checks import present_examples, with_checked_labels
from fastmeta.engines.functional.task_module import losses_of_outputs
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
    _, y, _, weight = batch.query
    labelled = with_checked_labels(loss, y, batch.query.y_name)
    present = present_examples(labelled, y, weight, dims=2)
    outputs = engine.outputs(adapted, batch.query_x, present)
    losses = losses_of_outputs(labelled, outputs, y, weight)
    outputs = outputs if differentiable_outputs else map_tensors(Tensor.detach, outputs)
    return losses if reduction == "none" else losses.mean(), outputs
