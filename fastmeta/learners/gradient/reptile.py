"""Reptile: steps towards the adapted parameters of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_integer
from fastmeta.core.trees import concatenated
from fastmeta.engines.base import Examples, MetaGradient, TaskBatch
from fastmeta.engines.minibatches import read_minibatches
from fastmeta.learners.gradient._precomputed_gradient import PrecomputedGradientLearner
from fastmeta.rules import PersistentAdam, Rule


class Reptile(PrecomputedGradientLearner):
    """Reptile (Nichol et al. 2018, arXiv 1803.02999): no derivative of the inner loop at all.

    ``grad = mean over tasks of (theta_0 - theta_K)``, so that gradient descent with step size
    epsilon is ``theta <- theta + epsilon mean(theta_K - theta)``, the paper's batched version.
    Meta-batches of one task are its serial version.

    In training, a task's examples are its support and its queries together. Each inner step sees
    ``inner_batch`` of them, in an order drawn by PyTorch's generator for each meta-batch.
    Adaptation sees the complete support at every step.

    ``meta_loss`` returns the loss and the outputs on the queries after the inner loop, which has
    trained on them. Use the loss to see that training progresses, not to judge generalisation.

    Args:
        model: as for ``MAML``.
        lr: inner step size, 0.001 as in the paper.
        steps: inner steps K, at least 1; 5 as in the paper. A single step is joint training.
        loss: as for ``MAML``.
        inner_batch: examples an inner step; None: all of them. 10 as in the paper for one shot.
        rule: the rule that takes the inner steps; None: ``PersistentAdam(model)``, Adam with
            beta1 = 0 whose state continues from meta-batch to meta-batch, as in the authors' code.
        options: the options ``task_chunk``, ``engine`` and ``norm_statistics`` of ``MAML``.

    Raises:
        TypeError, ValueError: as ``MAML``; an ``inner_batch`` that is no positive integer.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.Reptile(torch.nn.Linear(3, 2))
        >>> outer = torch.optim.SGD(learner.parameters(), lr=1.0)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()  # theta_0 - theta_K, mean over tasks
        >>> outer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        steps: int = 5,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        inner_batch: int | None = 10,
        rule: Rule | None = None,
        **options: Any,
    ) -> None:
        check_integer("steps", steps, 1)
        if inner_batch is not None:
            check_integer("inner_batch", inner_batch, 1)
        rule = PersistentAdam(model, adapt=options.get("adapt")) if rule is None else rule
        # The inner loop is never differentiated: first order keeps no tape.
        super().__init__(model, lr, steps, first_order=True, loss=loss, rule=rule, **options)
        self.inner_batch = inner_batch

    def _gradient(self, batch: TaskBatch) -> MetaGradient:
        self._refuse_other_gradients()
        engine = self._engine
        _check_examples(batch.support)
        _check_examples(batch.query)
        x = concatenated((batch.support_x, batch.query_x), 1)
        y = concatenated((batch.support_y, batch.query_y), 1)
        examples = Examples(x, y)
        batches = read_minibatches(self._draw_indices(examples.size), self.steps, examples)
        with engine.options.inner_rule.persist_state():
            lr = self._step_size(self.steps)
            adapted = engine.adapt(None, lr, examples, batches)
        losses, outputs, *_ = engine.query_losses(adapted, batch.query)
        grads = (engine.parameters() - adapted).mean(0)
        return MetaGradient(losses.mean(), outputs, grads, None, {})

    def _refuse_other_gradients(self) -> None:
        """Raise ValueError if what is not adapted is to be learned: its gradient would be 0."""
        if self.adapted_names is not None:
            raise ValueError(
                "adapt: Reptile has a gradient to adapted parameters only; freeze the others "
                "(requires_grad=False) instead"
            )
        if any(tensor.requires_grad for tensor in self.outer_tensors):
            raise ValueError(
                "outer: Reptile has a gradient to the module's parameters only; parameters of the "
                "loss and outer tensors must not require one"
            )

    def _draw_indices(self, examples: int) -> Tensor | None:
        """Indices ``[K, B]`` of each step's examples: consecutive parts of successive shuffles."""
        if self.inner_batch is None or self.inner_batch >= examples:
            return None
        needed = self.steps * self.inner_batch
        shuffles = [torch.randperm(examples) for _ in range(-(-needed // examples))]
        return torch.cat(shuffles)[:needed].view(self.steps, self.inner_batch)


def _check_examples(examples: Examples) -> None:
    """ValueError for a tensor of a tree that has no row an example: support and queries join."""
    for name, tensor in examples.named().items():
        if tensor.ndim < 2 or tensor.shape[1] != examples.size:
            expected = f"[{examples.tasks}, {examples.size}, ...]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
