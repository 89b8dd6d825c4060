"""Class means refined by soft k-means on the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_integer
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.nearest import check_finite
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototypes import prototypes


class SoftKMeans(Head):
    """Class means that the queries refine by steps of soft k-means.

        p_qn = softmax_n(-scale |x_q - c_n|^2)
        c_n <- (sum_s z_sn x_s + sum_q p_qn x_q) / (sum_s z_sn + sum_q p_qn)

    with z the labels of the support as 0 and 1; then ``logits = -scale |x_q - c_n|^2``. With 0
    steps this is :class:`NearestCentroid`. Differentiable.

    Args:
        steps: number of refinements, at least 0.
        scale: factor of the squared distances, an inverse temperature.
        normalize, center: see :class:`Head`.

    Source: Ren et al. 2018 (arXiv 1803.00676), section 3.1.1, with the queries as the unlabelled
    examples.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> support, query = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0], [4.0]])
        >>> fm.heads.SoftKMeans(scale=100.0)(support, torch.tensor([0, 1]), query).argmax(-1)
        tensor([0, 1, 1])
    """

    transductive = True

    def __init__(
        self,
        steps: int = 1,
        scale: float = 1.0,
        *,
        normalize: bool = False,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        self.steps = steps
        self.scale = check_finite("scale", scale)

    def _logits(self, tasks: Tasks) -> Tensor:
        query = tasks.query
        centres = prototypes(tasks.support, tasks.labels, tasks.num_classes)
        if self.steps:
            member = tasks.member
            counts, sums = member.sum(2, keepdim=True), member @ tasks.support
        for _ in range(self.steps):
            scores = self._scores(query, centres).mT
            shares = torch.softmax(tasks.competing(scores), 1)  # [T, N, Q]
            if tasks.queries is not None:
                shares = shares * tasks.queries.unsqueeze(1)
            total = counts + shares.sum(2, keepdim=True)
            centres = (sums + shares @ query) / total.where(total > 0, 1)
        return self._scores(query, centres)

    def _scores(self, query: Tensor, centres: Tensor) -> Tensor:
        return -self.scale * pairwise_distance(query, centres)
