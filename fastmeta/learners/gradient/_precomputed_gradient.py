"""Base of learners that compute their meta-gradient without differentiating the meta-loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.core.trees import Tree
from fastmeta.engines.autograd import is_learned, once_differentiable
from fastmeta.engines.base import MetaGradient, TaskBatch
from fastmeta.engines.functional.captured import taking_gradient
from fastmeta.learners._compile import as_single_op
from fastmeta.learners.gradient.maml import MAML


class PrecomputedGradientLearner(MAML):
    """A learner that computes its own meta-gradient; it adapts as MAML does.

    Subclasses implement ``_gradient``: the loss, the outputs on the queries and the meta-gradient.
    """

    @as_single_op
    def meta_loss(  # type: ignore[override]  # there are no step weights
        self, support_x: Tree, support_y: Tree, query_x: Tree = None, query_y: Tree = None
    ) -> tuple[Tensor, Tree]:
        """The mean query loss after adaptation; its ``backward`` gives the meta-gradient.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]`` int64 labels, or floating-point targets ``[T, S, ...]``.
            query_x, query_y: the same with Q examples. Batches may be trees, as for ``MAML``.

        Returns:
            ``loss`` and the detached outputs on the queries ``[T, Q, N]``. The module's parameters
            get a gradient, and the outer tensors if there are any; it can be taken once. Inputs
            get none.

        Raises:
            TypeError, ValueError: naming the argument that does not fit; no tasks or no examples;
                an ``lr`` or a rule that is to be learned.
        """
        result = self.meta_gradient(support_x, support_y, query_x, query_y)
        shared = [self.module.get_parameter(name) for name in result.shared_grads]
        outer = [tensor for tensor in self.outer_tensors if tensor.requires_grad]
        grads = result.grads, *result.shared_grads.values(), *result.outer_grads
        sources = self._engine.parameters(), *shared, *outer
        return _WithGradient.apply(result.loss, grads, *sources), result.outputs

    def meta_gradient(  # type: ignore[override]
        self, support_x: Tree, support_y: Tree, query_x: Tree = None, query_y: Tree = None
    ) -> MetaGradient:
        """The meta-loss and its gradient as values, as ``MAML.meta_gradient``."""
        self._refuse_learned_rates()
        batch, _ = self._batch((support_x, support_y, query_x, query_y), None, None)
        token = taking_gradient.set(torch.is_grad_enabled())
        try:
            with torch.no_grad():
                return self._gradient(batch)
        finally:
            taking_gradient.reset(token)

    def _refuse_learned_rates(self) -> None:
        """ValueError for step sizes and rules that are to be learned: they get no gradient here."""
        learned = [f"rule.{n}" for n, p in self._rule_parameters() if p.requires_grad]
        if is_learned(self.lr):
            learned.insert(0, "lr")
        if learned:
            raise ValueError(
                f"{learned[0]}: expected one that is not learned, as {type(self).__name__} has no "
                "gradient to it; requires_grad_(False) fixes it"
            )

    def _rule_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [] if self.rule is None else list(self.rule.named_parameters())

    def _gradient(self, batch: TaskBatch) -> MetaGradient:
        """The loss, the outputs on the queries, and the gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _gradient")


class _WithGradient(torch.autograd.Function):
    """Identity on the loss; the backward returns the gradient that was computed for it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return loss.clone()  # an input that is returned would be a view of itself

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = [grad_loss * grad for grad in ctx.saved_tensors]
        return None, None, *once_differentiable(grads)
