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
    nothing = means.new_zeros(*means.shape[:2], tasks.query.shape[1])
    start, labels = torch.cat([means, nothing], 2), torch.cat([member, nothing], 2)
    share = _joined(tasks, 1.0, 1.0)[..., count:].mT  # [T, Q, 1]
    of_support = _joined(tasks, scale * weights.cross_entropy, 0.0)
    of_queries = _joined(tasks, 0.0, scale)
    from_labels = of_support * labels

    def gradient(scores: Tensor) -> Tensor:
        """Gradient of the loss in the scores ``[T, N, S + Q]``."""
        log = torch.log_softmax(tasks.competing(scale * scores), 1)
        p = log.exp()
        if tasks.classes is not None:
            log = log.masked_fill(~tasks.classes.unsqueeze(2), 0)
        marginal = (p[..., count:] @ share).clamp(min=_TINY).log()
        along = torch.sub(
            weights.marginal_entropy * marginal, log, alpha=weights.conditional_entropy
        )
        along = along - (p * along).sum(1, keepdim=True)
        return p * torch.addcmul(of_support, of_queries, along) - from_labels

    scores = descent.scores(tasks, start, gradient)
    return scale * scores[..., count:].mT


def _joined(tasks: Tasks, of_support: float, of_queries: float) -> Tensor:
    """Factors ``[T, 1, S + Q]`` of means over the support and over the queries."""
    shares = (of_support * tasks.share_of_support(), of_queries * tasks.share_of_queries())
    return torch.cat([share.expand(len(tasks.query), 1, -1) for share in shares], 2)
