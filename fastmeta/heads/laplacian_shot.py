"""Nearest class means, smoothed over a graph of the queries: LaplacianShot."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_integer
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.bd_cspn import rectified
from fastmeta.heads.nearest import check_finite
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototypes import prototypes


class LaplacianShot(Head):
    """The nearest class mean, where queries that are neighbours agree.

        y_q = softmax_n(-|x_q - c_n|^2 + lam sum_j W_qj y_jn)             steps bound updates

    with W_qj = 1 if query j is among the nearest of query q, else 0. The logits are the argument
    of the last softmax. Differentiable, with the graph as a constant.

    Args:
        steps: number of bound updates, at least 0. Each lowers an upper bound of the energy.
        lam: factor of the agreement between neighbours.
        knn: number of nearest queries, the query itself among them, as the authors count.
        rectify: whether class means are rectified first, as :class:`BDCSPN` does.
        scale: of the rectification.
        shift_queries: with ``rectify``, whether moved queries are also what is classified.
        normalize, center: see :class:`Head`.

    Source: Ziko, Dolz, Granger, Ben Ayed 2020 (arXiv 2006.15486), algorithm 1.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.LaplacianShot(knn=2)
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2).repeat(2, 1)).argmax(-1)
        tensor([0, 1, 0, 1])
    """

    transductive = True

    def __init__(
        self,
        steps: int = 20,
        lam: float = 0.7,
        knn: int = 3,
        rectify: bool = True,
        scale: float = 10.0,
        shift_queries: bool = True,
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        check_integer("knn", knn, 1)
        self.steps = steps
        self.lam = check_finite("lam", lam)
        self.knn = knn
        self.rectify = bool(rectify)
        self.scale = check_finite("scale", scale)
        self.shift_queries = bool(shift_queries)

    def _logits(self, tasks: Tasks) -> Tensor:
        if self.rectify:
            shift, centres = rectified(tasks, self.scale)
            # Centres that move the other way have the same distances.
            centres = centres - shift if self.shift_queries else centres
        else:
            centres = prototypes(tasks.support, tasks.labels, tasks.num_classes)
        unary = tasks.competing(-pairwise_distance(centres, tasks.query))  # [T, N, Q]
        query = tasks.query.detach()
        query = query if tasks.origin is None else query - tasks.origin.detach()
        graph = neighbours(query, self.knn - 1, tasks.queries)
        agreement = self.lam * graph.mT
        scores = unary
        for _ in range(self.steps):
            scores = unary + scores.softmax(1) @ agreement
        return scores.mT


def neighbours(x: Tensor, count: int, present: Tensor | None) -> Tensor:
    """Graph ``[T, Q, Q]``: 1 at the ``count`` nearest others of a row, else 0; the first of equals.

    Args:
        x: rows ``[T, Q, D]``.
        count: number of neighbours. Rows with fewer others have all of them.
        present: bool ``[T, Q]``, the rows that can be neighbours; None: all.
    """
    products = x @ x.mT
    # The length of the row itself does not change the order of its neighbours.
    far = torch.sub(products.diagonal(dim1=1, dim2=2).unsqueeze(1), products, alpha=2)
    far.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    if present is not None:
        far.masked_fill_(~present.unsqueeze(1), torch.inf)
    graph = torch.zeros_like(far)
    for _ in range(min(count, x.shape[1] - 1)):
        least, nearest = far.min(2, keepdim=True)
        graph.scatter_(2, nearest, (least < torch.inf).to(x.dtype))
        far.scatter_(2, nearest, torch.inf)
    return graph
