"""MAML++: MAML with the changes that make several inner steps train stably."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastmeta.core.checks import check_integer
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import selected_names
from fastmeta.core.trees import Tree
from fastmeta.engines.base import Engine, MetaGradient
from fastmeta.learners._compile import as_single_op
from fastmeta.learners.gradient._start import Start
from fastmeta.learners.gradient.maml import MAML
from fastmeta.learners.schedules import cosine_schedule


class MAMLPlusPlus(MAML):
    """MAML++ (Antoniou et al. 2019, arXiv 1810.09502).

    - Learned step sizes of each layer and inner step (LSLR), ``lr [K, L]``:
      ``theta_{k+1} = theta_k - lr_k * grad L_s(theta_k)``.
    - Multi-step loss, ``sum_k w_k L_q(theta_k)``, annealed to the last step's loss only: with
      ``t = min(1, iteration / multi_step_iterations)``, ``w_k = (1 - t) / K`` for k < K and
      ``w_K = (1 - t) / K + t``.
    - Derivative-order annealing: first order for the first ``first_order_iterations``.
    - Batch norm with a scale and a shift for each step: part of the model, see
      ``fastmeta.models.with_per_step_norms``.
    - A cosine schedule of the outer step size: ``schedule``.

    ``iteration`` counts the meta-losses and meta-gradients in training mode with gradients enabled;
    it is part of the state dict, so a resumed training continues the annealing.

    Args:
        model: as for ``MAML``.
        lr: initial value of every step size.
        steps: inner steps K, at least 1; 5 as in the paper. Adaptation takes at most K steps.
        loss: as for ``MAML``.
        multi_step_iterations: iterations with a multi-step loss; 0: none. 5,000 is 10 of the
            paper's epochs of 500.
        first_order_iterations: iterations of first order at the start; 0: none. 25,000 is 50 of
            the paper's epochs.
        options: all other options of ``MAML`` except ``learn_lr`` and ``first_order``.

    Attributes:
        iteration: number of meta-losses so far.

    Raises:
        TypeError, ValueError: as ``MAML``; numbers of iterations or steps out of range.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> net = fm.models.with_per_step_norms(fm.models.Conv4(8), steps=5)
        >>> learner = fm.MAMLPlusPlus(net, multi_step_iterations=1000, first_order_iterations=0)
        >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
        >>> schedule = learner.schedule(optimizer, 2000)
        >>> x, y = torch.randn(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()
        >>> learner.lr.shape, learner.iteration
        (torch.Size([5, 18]), 1)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        steps: int = 5,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        multi_step_iterations: int = 5000,
        first_order_iterations: int = 25000,
        **options: Any,
    ) -> None:
        check_integer("steps", steps, 1)
        check_integer("multi_step_iterations", multi_step_iterations, 0)
        check_integer("first_order_iterations", first_order_iterations, 0)
        if isinstance(lr, bool) or not isinstance(lr, (int, float)):
            raise TypeError(f"lr: expected a number, got {type(lr).__name__}")
        layout = ParameterLayout.of(model, selected_names(model, options.get("adapt")))
        shape = steps, len(layout.names)
        sizes = torch.full(shape, float(lr), dtype=layout.dtype, device=layout.device)
        super().__init__(model, sizes, steps, loss=loss, learn_lr=True, **options)
        self.multi_step_iterations = multi_step_iterations
        self.first_order_iterations = first_order_iterations
        self.iteration = 0

    def step_weights(self) -> list[float] | None:
        """w_1 .. w_K of the query losses at this iteration; None: the last step's loss only."""
        if self.steps == 1 or self.iteration >= self.multi_step_iterations:
            return None
        t = self.iteration / self.multi_step_iterations
        share = (1 - t) / self.steps
        return [share] * (self.steps - 1) + [share + t]

    @as_single_op
    def meta_loss(  # type: ignore[override]  # it has step weights of its own
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree = None,
        query_y: Tree = None,
        start: Start | None = None,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        *,
        inner_batches: Tensor | str | None = None,
    ) -> tuple[Tensor, Tree]:
        """The annealed loss of this iteration, as ``MAML.meta_loss`` with ``step_weights()``."""
        data = support_x, support_y, query_x, query_y
        given = self.step_weights(), start, support_weight, query_weight
        result = super().meta_loss(*data, *given, inner_batches=inner_batches)
        self._count(torch.is_grad_enabled())
        return result

    def meta_gradient(  # type: ignore[override]
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree = None,
        query_y: Tree = None,
        start: Tensor | None = None,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        *,
        inner_batches: Tensor | str | None = None,
    ) -> MetaGradient:
        """The annealed loss and its gradient, as ``MAML.meta_gradient`` with its weights."""
        data = support_x, support_y, query_x, query_y
        given = self.step_weights(), start, support_weight, query_weight
        result = super().meta_gradient(*data, *given, inner_batches=inner_batches)
        self._count(True)
        return result

    def schedule(self, optimizer: Optimizer, iterations: int) -> LRScheduler:
        """The cosine schedule of the outer step size, see ``fastmeta.learners.schedules``."""
        return cosine_schedule(optimizer, iterations)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.iteration)

    def set_extra_state(self, state: Tensor) -> None:
        self.iteration = int(state)

    def _count(self, trains: bool) -> None:
        if self.training and trains:
            self.iteration += 1

    @property
    def _engine(self) -> Engine:
        first_order = self.iteration < self.first_order_iterations
        # Only on a change: setting an engine option builds the engine anew.
        if first_order != self.first_order:
            self.first_order = first_order
        return super()._engine
