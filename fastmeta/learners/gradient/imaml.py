"""iMAML: the implicit meta-gradient at the solution of the inner problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.checks import check_choice, check_integer, check_number
from fastmeta.core.random_state import RandomState
from fastmeta.engines.base import MetaGradient, TaskBatch
from fastmeta.engines.inner_loop import OUTER, SHARED
from fastmeta.learners.gradient._conjugate_gradients import conjugate_gradients
from fastmeta.learners.gradient._precomputed_gradient import PrecomputedGradientLearner
from fastmeta.learners.gradient._step_size import StepSize
from fastmeta.rules import Proximal, Rule

CURVATURES = ("hessian", "ggn")


class IMAML(PrecomputedGradientLearner):
    """iMAML (Rajeswaran et al. 2019, arXiv 1909.04630): implicit gradients.

    The inner loop approximates ``theta* = argmin L_s(theta) + lambda / 2 |theta - theta_0|^2``.
    With H the Hessian of L_s at theta*, the meta-gradient is the mean over tasks of v, where
    ``(I + H / lambda) v = grad L_q(theta*)``, solved by conjugate gradients on Hessian-vector
    products. Memory does not grow with the inner steps. A task whose ``I + H / lambda`` is not
    positive along ``grad L_q(theta*)`` gets that first-order gradient, with a RuntimeWarning; a
    larger ``regularization`` or ``cg_damping`` avoids it, and ``curvature="ggn"`` where the loss is
    convex in the outputs.

    Parameters that are learned and not adapted (``adapt``) and outer tensors, phi, get the mean of
    ``d L_q / d phi - d <grad L_s(theta*), v> / d phi / lambda``. At the solution,
    ``grad L_s(theta*, phi) + lambda (theta* - theta_0) = 0``, so that
    ``d theta* / d phi = -(H + lambda)^-1 d grad L_s / d phi``, and ``(H + lambda)^-1 grad L_q`` is
    ``v / lambda``. First order leaves the second term out.

    Args:
        model: as for ``MAML``.
        lr: inner step size, as for ``MAML``; not learned.
        steps: inner steps; 16.
        loss: as for ``MAML``.
        regularization: the paper's lambda, above 0; 2.0 as in the paper for Omniglot.
        cg_steps: Hessian-vector products a meta-gradient, at least 0; 5 as in the paper. 0 is first
            order.
        cg_damping: delta >= 0 in ``(I + delta I + H / lambda) v = grad L_q(theta*)``, which keeps
            the system solvable under negative curvature; 0. The authors' code has 1.0 and also
            adds 10 to lambda.
        curvature: H in the system: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, see
            ``fastmeta.ggnvp``: positive semidefinite for the cross entropy and the squared error.
        rule: the rule that takes the inner steps with the gradient of the regularised loss; None:
            plain descent.
        options: the options ``adapt``, ``outer``, ``inner_loss``, ``task_chunk``, ``hvp_mode``,
            ``engine`` and ``norm_statistics`` of ``MAML``.

    Raises:
        TypeError, ValueError: as ``MAML``; numbers out of range.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.IMAML(torch.nn.Linear(3, 2), lr=0.1)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: StepSize = 0.1,
        steps: int = 16,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        regularization: float = 2.0,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        curvature: str = "hessian",
        rule: Rule | None = None,
        **options: Any,
    ) -> None:
        check_integer("cg_steps", cg_steps, 0)
        check_choice("curvature", curvature, CURVATURES)
        number = isinstance(regularization, (int, float)) and not isinstance(regularization, bool)
        if not number:
            kind = type(regularization).__name__
            raise TypeError(f"regularization: expected a number, got {kind}")
        if not 0 < regularization < math.inf:
            raise ValueError(
                f"regularization: expected a finite number above 0, got {regularization}"
            )
        proximal = Proximal(regularization, rule)
        super().__init__(model, lr, steps, loss=loss, rule=proximal, **options)
        self.regularization = regularization
        self.cg_steps, self.cg_damping = cg_steps, check_number("cg_damping", cg_damping)
        self.curvature = curvature

    def _gradient(self, batch: TaskBatch) -> MetaGradient:
        engine = self._engine
        adapted = engine.adapt(None, self._step_size(self.steps), batch.support)
        losses, outputs, to_theta, to_shared = engine.query_losses(
            adapted, batch.query, gradient=True
        )
        grads = cast("Tensor", to_theta)

        product_with_h = engine.ggnvp if self.curvature == "ggn" else engine.hvp
        # The system has one matrix: all products with it see the same dropout masks.
        random = RandomState(adapted.device)

        def product(v: Tensor) -> Tensor:
            with random.replay():
                curved = product_with_h(adapted, batch.support, v)
            return (1 + self.cg_damping) * v + curved / self.regularization

        if self.cg_steps > 0:
            grads, solved = conjugate_gradients(product, grads, self.cg_steps)
            if to_shared:
                # A task without a solution is first order: theta* does not depend on phi.
                v = torch.where(solved, grads, 0.0)
                with random.replay():
                    mixed = engine.mixed_products(adapted, batch.support, v)
                to_shared = {n: g - mixed[n] / self.regularization for n, g in to_shared.items()}
        means = {name: grad / len(losses) for name, grad in to_shared.items()}
        shared = {n.removeprefix(SHARED): g for n, g in means.items() if n.startswith(SHARED)}
        # A task program reads no outer tensor.
        outer = tuple(
            means.get(f"{OUTER}{i}", torch.zeros_like(tensor))
            for i, tensor in enumerate(self.outer_tensors)
            if tensor.requires_grad
        )
        return MetaGradient(losses.mean(), outputs, grads.mean(0), None, {}, outer, shared)
