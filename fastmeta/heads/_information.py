"""The losses of TIM and of transductive fine-tuning, on all tasks: gradients in the scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.heads._centres import Descent
from fastmeta.heads.base import Tasks

_TINY = 1e-30  # the least probability that is divided by or has a logarithm


class Weights(NamedTuple):
    """Factors of the parts of the loss."""

    cross_entropy: float
    marginal_entropy: float
    conditional_entropy: float


def descended(tasks: Tasks, descent: Descent, scale: float, weights: Weights) -> Tensor:
    """Logits ``[T, Q, N]`` of the queries after steps on the centres, from the class means.

    L = w1 mean_s -log p_s,y(s) - w2 H(mean_q p_q) + w3 mean_q H(p_q),  p = softmax(scale score)
    """
    count = tasks.support.shape[1]
    member = tasks.member
    means = member / member.sum(2, keepdim=True).clamp(min=1)
    start = torch.cat([means, means.new_zeros(*means.shape[:2], tasks.query.shape[1])], 2)
    of_support, of_queries = tasks.share_of_support(), tasks.share_of_queries()

    def gradient(scores: Tensor) -> Tensor:
        """Gradient of the loss in the scores ``[T, N, S + Q]``."""
        log = torch.log_softmax(tasks.competing(scale * scores), 1)
        p = log.exp()
        if tasks.classes is not None:
            log = log.masked_fill(~tasks.classes.unsqueeze(2), 0)
        to_support = (p[..., :count] - member) * (scale * weights.cross_entropy * of_support)
        p, log = p[..., count:], log[..., count:]
        marginal = (p * of_queries).sum(2, keepdim=True).clamp(min=_TINY).log()
        along = weights.marginal_entropy * marginal - weights.conditional_entropy * log
        along = along - (p * along).sum(1, keepdim=True)
        return torch.cat([to_support, p * along * (scale * of_queries)], 2)

    scores = descent.scores(tasks.rows, start, gradient)
    return scale * scores[..., count:].mT
