"""Class means rectified by the queries: BD-CSPN."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_integer
from fastmeta.heads.base import Head, Tasks, lengths, unit
from fastmeta.heads.nearest import check_finite
from fastmeta.ops.prototypes import prototypes
from fastmeta.ops.reference import safe_sqrt

_EPS = 1e-12  # the least length that cosines divide by


class BDCSPN(Head):
    """Class means rectified by the queries that resemble them most.

        x_q <- x_q + mean(support) - mean(queries)                        cross-class bias
        n_q = argmax_n cos(x_q, c_n)                                      pseudo-label
        c_n <- sum_i w_i x_i,  w_i ~ exp(scale cos(x_i, c_n))             intra-class bias

    with i over the support of class n and the queries of pseudo-label n. Then
    ``logits = scale * cos(x_q, c_n)``. Differentiable, with the pseudo-labels as constants.

    Args:
        scale: epsilon of the paper, which sharpens the weights.
        top: number of queries that a class takes, the most similar first. None: all of its
            pseudo-label.
        shift_queries: whether moved queries are also what is classified, as in the paper. False
            moves them only to rectify the class means.
        normalize, center: see :class:`Head`.

    Source: Liu, Song, Qin 2020 (arXiv 1911.10713), equations 4 to 8.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.BDCSPN()
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2)).argmax(-1)
        tensor([0, 1])
    """

    transductive = True

    def __init__(
        self,
        scale: float = 10.0,
        top: int | None = None,
        shift_queries: bool = True,
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        self.scale = check_finite("scale", scale)
        if top is not None:
            check_integer("top", top, 1)
        self.top = top
        self.shift_queries = bool(shift_queries)

    def _logits(self, tasks: Tasks) -> Tensor:
        shift, centres = rectified(tasks, self.scale, self.top)
        return self.scale * cosines(centres, tasks.query, shift if self.shift_queries else None).mT


def rectified(tasks: Tasks, scale: float, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Shift of the queries ``[T, 1, D]`` and rectified class means ``[T, N, D]``, see BDCSPN."""
    support, query = tasks.support, tasks.query
    shift = tasks.share_of_support() @ support - tasks.share_of_queries() @ query
    means = prototypes(support, tasks.labels, tasks.num_classes)
    of_support, of_queries = cosines(means, support), cosines(means, query, shift)
    labelled = pseudo_labelled(tasks.competing(of_queries), tasks.queries, top)
    weight = tasks.member * (scale * (of_support - 1)).exp()
    weight_of_queries = labelled * (scale * (of_queries - 1)).exp()
    moved = weight_of_queries.sum(2, keepdim=True)
    total = weight.sum(2, keepdim=True) + moved
    sums = weight @ support + weight_of_queries @ query + moved * shift
    return shift, sums / total.where(total > 0, 1)


def pseudo_labelled(similarity: Tensor, queries: Tensor | None, top: int | None) -> Tensor:
    """Classes of the queries by their similarity ``[T, N, Q]``, as 0 and 1; the first of equals.

    Args:
        similarity: to every class, minus infinity at classes that do not compete.
        queries: bool ``[T, Q]``, those that exist; None: all.
        top: queries that a class gets at most; None: no limit.
    """
    ways, count = similarity.shape[1:]
    classes = torch.arange(ways, device=similarity.device).unsqueeze(1)
    chosen = similarity.argmax(1, keepdim=True) == classes
    if queries is not None:
        chosen = chosen & queries.unsqueeze(1)
    if top is not None and top < count:
        ranked = similarity.masked_fill(~chosen, -torch.inf)
        ranked = ranked.sort(dim=2, descending=True, stable=True).indices
        best = torch.zeros_like(chosen).scatter(2, ranked[..., :top], True)
        chosen = chosen & best
    return chosen.to(similarity.dtype)


def cosines(centres: Tensor, rows: Tensor, shift: Tensor | None = None) -> Tensor:
    """Cosines ``[T, N, B]`` between centres ``[T, N, D]`` and rows ``[T, B, D]`` + shift."""
    centres, length = unit(centres), lengths(rows).mT
    if shift is None:
        return (centres @ rows.mT) / length.clamp(min=_EPS)
    # The moved rows are not formed: their products follow from products with the shift.
    products = torch.cat([centres, shift], 1) @ rows.mT
    along = products[:, -1:]
    squares = length.square() + 2 * along + shift.square().sum(2, keepdim=True)
    dots = products[:, :-1] + centres @ shift.mT
    return dots / safe_sqrt(squares.clamp(min=0)).clamp(min=_EPS)
