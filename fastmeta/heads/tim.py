"""Transductive information maximisation: TIM."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_choice, check_integer, check_number
from fastmeta.heads._centres import METRICS, OPTIMIZERS, Descent
from fastmeta.heads._information import Weights, descended
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.nearest import check_finite


class TIM(Head):
    """Class centres that maximise the mutual information of queries and their labels.

        p = softmax_n(temperature * score(x, c_n))
        L = cross_entropy_weight * mean_s -log p_s,y(s)
            - marginal_entropy_weight * H(mean_q p_q) + conditional_entropy_weight * mean_q H(p_q)
        c_n <- c_n - lr dL/dc_n            steps times, from the class means

    Steps of "sgd" are taken in the dual: a centre is a combination of the examples, whose Gram
    matrix is computed once, so that a step costs ``(S + Q)^2 N`` operations for any number of
    features. "adam" takes the authors' steps, each of ``(S + Q) N D`` operations.
    ``logits = temperature * score``. Differentiable through all steps.

    Args:
        steps: number of steps, at least 0. The paper takes 1000 of Adam.
        lr: their size. None: 1e-4 for "adam", as in the paper, and 0.1 / temperature for "sgd".
        temperature: factor of the scores.
        cross_entropy_weight, marginal_entropy_weight, conditional_entropy_weight: as above.
        metric: the score is ``"sqeuclidean"``: ``-|x - c|^2 / 2``, as in the paper;
            ``"euclidean"``: ``-|x - c|``; or ``"cosine"``.
        optimizer: ``"sgd"`` or ``"adam"``.
        normalize, center: see :class:`Head`.

    Source: Boudiaf et al. 2020 (arXiv 2008.11297), equations 1 to 3 and section 4.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.TIM(steps=5)
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2)).argmax(-1)
        tensor([0, 1])
    """

    transductive = True

    def __init__(
        self,
        steps: int = 50,
        lr: float | None = None,
        temperature: float = 15.0,
        cross_entropy_weight: float = 0.1,
        marginal_entropy_weight: float = 1.0,
        conditional_entropy_weight: float = 0.1,
        metric: str = "sqeuclidean",
        optimizer: str = "sgd",
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        self.steps = steps
        self.temperature = check_finite("temperature", temperature)
        self.cross_entropy_weight = check_number("cross_entropy_weight", cross_entropy_weight)
        self.marginal_entropy_weight = check_number(
            "marginal_entropy_weight", marginal_entropy_weight
        )
        self.conditional_entropy_weight = check_number(
            "conditional_entropy_weight", conditional_entropy_weight
        )
        self.metric = check_choice("metric", metric, METRICS)
        self.optimizer = check_choice("optimizer", optimizer, OPTIMIZERS)
        if lr is None:
            lr = 1e-4 if optimizer == "adam" else 0.1 / abs(self.temperature or 1.0)
        self.lr = check_number("lr", lr)

    def _logits(self, tasks: Tasks) -> Tensor:
        scale = self.temperature * (0.5 if self.metric == "sqeuclidean" else 1.0)
        weights = Weights(
            self.cross_entropy_weight,
            self.marginal_entropy_weight,
            self.conditional_entropy_weight,
        )
        descent = Descent(self.metric, self.steps, self.lr, self.optimizer)
        return descended(tasks, descent, scale, weights)
