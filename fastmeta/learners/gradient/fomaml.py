"""First-order MAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.learners.gradient._step_size import StepSize
from fastmeta.learners.gradient.maml import MAML


class FOMAML(MAML):
    """First-order MAML: no second derivatives in the meta-gradient (Finn et al. 2017, 5.2).

    ``grad = mean over tasks of grad L_q(theta_K)``: the gradient of the query loss at the adapted
    parameters stands for the gradient at the initial ones, as if inner steps were translations.

    Args:
        model, lr, steps, loss: as for ``MAML``, with its defaults.
        options: all other options of ``MAML`` except ``first_order``.

    Raises:
        TypeError, ValueError: as ``MAML``.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.FOMAML(torch.nn.Linear(3, 2), lr=0.1, steps=5)
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: StepSize = 0.4,
        steps: int = 1,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        **options: Any,
    ) -> None:
        super().__init__(model, lr, steps, first_order=True, loss=loss, **options)
