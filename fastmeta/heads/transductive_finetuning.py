"""Class centres fine-tuned on support and queries."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_choice, check_integer, check_number
from fastmeta.heads._centres import METRICS, OPTIMIZERS, Descent
from fastmeta.heads._information import Weights, descended
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.nearest import check_finite


class TransductiveFinetuning(Head):
    """Class centres fine-tuned for confident predictions of the queries.

        p = softmax_n(temperature * score(x, c_n))
        L = mean_s -log p_s,y(s) + mean_q H(p_q)
        c_n <- c_n - lr dL/dc_n            steps times, from the class means

    The paper fine-tunes the whole network so; this is its last layer on stored features. See
    :class:`TIM` for the two optimizers. ``logits = temperature * score``. Differentiable through
    all steps.

    Args:
        steps: number of steps, at least 0.
        lr: their size. None: 5e-5 for "adam", as in the paper, and 0.1 / temperature for "sgd".
        temperature: factor of the scores.
        metric: the score is ``"cosine"``, ``"euclidean"``: ``-|x - c|``, or ``"sqeuclidean"``:
            ``-|x - c|^2``.
        optimizer: ``"sgd"`` or ``"adam"``.
        normalize, center: see :class:`Head`.

    Source: Dhillon, Chaudhari, Ravichandran, Soatto 2020 (arXiv 1909.02729), equation 8.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.TransductiveFinetuning(steps=5)
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2)).argmax(-1)
        tensor([0, 1])
    """

    transductive = True

    def __init__(
        self,
        steps: int = 25,
        lr: float | None = None,
        temperature: float = 1.0,
        metric: str = "euclidean",
        optimizer: str = "sgd",
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        self.steps = steps
        self.temperature = check_finite("temperature", temperature)
        self.metric = check_choice("metric", metric, METRICS)
        self.optimizer = check_choice("optimizer", optimizer, OPTIMIZERS)
        if lr is None:
            lr = 5e-5 if optimizer == "adam" else 0.1 / abs(self.temperature or 1.0)
        self.lr = check_number("lr", lr)

    def _logits(self, tasks: Tasks) -> Tensor:
        descent = Descent(self.metric, self.steps, self.lr, self.optimizer)
        return descended(tasks, descent, self.temperature, Weights(1.0, 0.0, 1.0))
