"""Meta-SGD: MAML with a learned step size for every element of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.parameter_selection import selected_names
from fastmeta.learners.gradient.maml import MAML


class MetaSGD(MAML):
    """Meta-SGD (Li et al. 2017, arXiv 1707.09835): direction and length of the steps are learned.

    ``theta_{k+1} = theta_k - alpha * grad L_s(theta_k)`` with alpha ``[P]``, one step size an
    element. It is learned together with theta and may become negative.

    Args:
        model: as for ``MAML``.
        lr: initial value of alpha: a number, or a pair ``(low, high)`` to draw each element
            uniformly with PyTorch's generator; (0.005, 0.1) as in the paper.
        steps: inner steps; 1 as in the paper.
        loss: as for ``MAML``.
        options: all other options of ``MAML`` except ``learn_lr``.

    Raises:
        TypeError, ValueError: as ``MAML``; an ``lr`` that is neither a number nor an ordered pair
            of numbers.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.MetaSGD(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
        >>> loss, logits = learner.meta_loss(x, y, x, y)
        >>> loss.backward()
        >>> learner.lr.shape, learner.lr.grad.shape
        (torch.Size([8]), torch.Size([8]))
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | tuple[float, float] = (0.005, 0.1),
        steps: int = 1,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        **options: Any,
    ) -> None:
        low, high = _range(lr)
        layout = ParameterLayout.of(model, selected_names(model, options.get("adapt")))
        start = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
        start.uniform_(low, high) if low < high else start.fill_(low)
        super().__init__(model, start, steps, loss=loss, learn_lr=True, **options)


def _range(lr: Any) -> tuple[float, float]:
    pair = (lr, lr) if isinstance(lr, (int, float)) else lr
    numbers = isinstance(pair, (tuple, list)) and all(isinstance(x, (int, float)) for x in pair)
    if not numbers or len(pair) != 2:
        raise TypeError(f"lr: expected a number or a pair (low, high), got {lr!r}")
    low, high = map(float, pair)
    if not -float("inf") < low <= high < float("inf"):
        raise ValueError(f"lr: expected finite numbers, the lower one first, got {lr!r}")
    return low, high
