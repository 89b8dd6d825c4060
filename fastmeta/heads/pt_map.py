"""Class centres from balanced assignments of the queries: PT-MAP."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.checks import check_integer, check_positive
from fastmeta.heads._transport import transported
from fastmeta.heads.base import Head, Tasks, unit
from fastmeta.heads.nearest import check_finite
from fastmeta.ops.prototypes import prototypes

_POWER_EPS = 1e-6  # of the paper, added to features before the power


class PTMAP(Head):
    """Power transform of the features, and centres from balanced assignments of the queries.

        x <- (relu(x) + 1e-6)^power, divided by its length
        P = the plan of optimal transport of queries to classes of equal size, with the costs
            lam |x_q - c_n|^2 and entropy: sum_n P_qn = 1, sum_q P_qn = Q / N
        c_n <- c_n + lr ((sum_s z_sn x_s + sum_q P_qn x_q) / (sum_s z_sn + sum_q P_qn) - c_n)

    ``steps`` times, from the class means. The logits are the logarithm of the last plan. Centres
    are combinations of class means and queries, whose Gram matrix is computed once. The plan is
    exact to rounding, where Sinkhorn's iterations stop at a tolerance. Classes of equal size are an
    assumption about the queries: it helps only where it holds. Differentiable.

    Args:
        steps: number of updates, at least 0.
        lr: alpha of the paper, which takes 0.4 for one shot and 0.2 for five.
        lam: lambda of the paper.
        power: beta of the paper. 1 leaves the transform out, and keeps negative features.
        unit_length: whether transformed features are divided by their length.
        normalize, center: before the transform, see :class:`Head`.

    Source: Hu, Gripon, Pateux 2021 (arXiv 2006.03806), equations 1 to 6.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.PTMAP(steps=2)
        >>> head(torch.eye(2), torch.arange(2), torch.eye(2)).argmax(-1)
        tensor([0, 1])
    """

    transductive = True

    def __init__(
        self,
        steps: int = 10,
        lr: float = 0.2,
        lam: float = 10.0,
        power: float = 0.5,
        unit_length: bool = True,
        *,
        normalize: bool = False,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("steps", steps, 0)
        check_positive("power", power)
        self.steps = steps
        self.lr = check_finite("lr", lr)
        self.lam = check_finite("lam", lam)
        self.power = float(power)
        self.unit_length = bool(unit_length)

    def _prepared(self, x: Tensor) -> Tensor:
        x = super()._prepared(x)
        if self.power != 1:
            x = x.clamp(min=0).add_(_POWER_EPS)
            x = x.sqrt_() if self.power == 0.5 else x.pow(self.power)
        return unit(x) if self.unit_length else x

    def _logits(self, tasks: Tasks) -> Tensor:
        ways, queries = tasks.num_classes, tasks.query.shape[1]
        means = prototypes(tasks.support, tasks.labels, ways)
        # Distances from amid the queries keep their digits.
        basis = torch.cat([means, tasks.query], 1) - tasks.query.mean(1, keepdim=True)
        gram = basis @ basis.mT  # of what all centres are combinations of
        lengths = gram.diagonal(dim1=1, dim2=2)[:, ways:].unsqueeze(1)
        own = torch.eye(ways, ways + queries, dtype=gram.dtype, device=gram.device)
        centres = own.expand(len(gram), -1, -1)
        counts = tasks.member.sum(2, keepdim=True)
        sizes, share = self._sizes(tasks)
        potentials = torch.zeros_like(sizes)
        for step in range(self.steps + 1):
            products = centres @ gram
            squares = (centres * products).sum(2, keepdim=True)
            distance = squares + lengths - 2 * products[..., ways:]
            scores = tasks.competing(-self.lam * distance)
            potentials, log = transported(scores, sizes, potentials, share)
            if step == self.steps:
                break
            plan = log.exp() if share is None else log.exp() * share
            target = torch.cat([counts * own[:, :ways], plan], 2)
            total = counts + plan.sum(2, keepdim=True)
            centres = torch.lerp(centres, target / total.where(total > 0, 1), self.lr)
        return log.mT

    def _sizes(self, tasks: Tasks) -> tuple[Tensor, Tensor | None]:
        """Queries of each class ``[T, N, 1]``, and the mass of each query, see ``transported``."""
        count, ways, queries = len(tasks.query), tasks.num_classes, tasks.query.shape[1]
        total = tasks.query.new_full((count, 1, 1), float(queries))
        share = None
        if tasks.queries is not None:
            share = tasks.queries.to(total.dtype).unsqueeze(1)
            total = share.sum(2, keepdim=True)
        if tasks.classes is None:
            return (total / ways).expand(count, ways, 1), share
        competes = tasks.classes.to(total.dtype).unsqueeze(2)
        return competes * total / competes.sum(1, keepdim=True), share
