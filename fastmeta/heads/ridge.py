"""Ridge regression on the support."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_positive
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.nearest import check_finite
from fastmeta.ops.ridge_head import ridge_head
from fastmeta.ops.task_linear import task_linear


class Ridge(Head):
    """Ridge regression to the labels as 0 and 1, in closed form: R2-D2.

        W = Y' (X X' + l2)^-1 X,    logits = scale * (W x_q + b)

    Differentiable any number of times. See :func:`fastmeta.ridge_head`, which also takes weights of
    examples and a prior of the weights.

    Args:
        l2: factor of the squared length of the weights, above 0.
        scale: factor of the logits.
        bias: whether there is a bias, which ``l2`` does not shrink. The paper has none.
        normalize, center: see :class:`Head`.

    Source: Bertinetto et al. 2019 (arXiv 1805.08136), section 3.2.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> fm.heads.Ridge(l2=1.0)(torch.eye(2), torch.arange(2), torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    def __init__(
        self,
        l2: float = 1.0,
        scale: float = 1.0,
        bias: bool = False,
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_positive("l2", l2)
        self.l2 = float(l2)
        self.scale = check_finite("scale", scale)
        self.bias = bool(bias)

    def _logits(self, tasks: Tasks) -> Tensor:
        weight, bias = ridge_head(
            tasks.support, tasks.labels, self.l2, num_classes=tasks.num_classes, bias=self.bias
        )
        return self.scale * task_linear(tasks.query, weight, bias)
