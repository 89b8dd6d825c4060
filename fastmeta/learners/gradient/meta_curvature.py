"""Meta-Curvature: MAML with a learned preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import rules
from fastmeta.learners.gradient._step_size import StepSize
from fastmeta.learners.gradient.maml import MAML


class MetaCurvature(MAML):
    """Meta-Curvature (Park & Oliva 2019, arXiv 1902.03356): MAML on transformed gradients.

    ``theta_{k+1} = theta_k - lr MC(grad L_s(theta_k))``, where MC multiplies the gradient of each
    parameter by learned matrices along its dimensions, ``M_o``, ``M_i`` and, of a convolution,
    ``M_f`` (``fastmeta.rules.MetaCurvature``). They start as the identity, which is MAML, and
    are learned together with theta.

    Args:
        model, lr, steps, loss: as for ``MAML``, with its defaults.
        rule: the rule that takes the step with the transformed gradient; None: plain descent.
        options: all other options of ``MAML``.

    Raises:
        TypeError, ValueError: as ``MAML``.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.MetaCurvature(torch.nn.Linear(3, 2), lr=0.1)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()
        >>> learner.rule.factors[0][0].grad.shape  # M_o of the weight [2, 3]
        torch.Size([2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: StepSize = 0.4,
        steps: int = 1,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        rule: rules.Rule | None = None,
        **options: Any,
    ) -> None:
        preconditioned = rules.MetaCurvature(model, rule, adapt=options.get("adapt"))
        super().__init__(model, lr, steps, loss=loss, rule=preconditioned, **options)
