"""Class means adapted to each other by attention: FEAT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.core.checks import check_choice, check_integer
from fastmeta.heads.base import Head, Tasks
from fastmeta.heads.nearest import check_finite
from fastmeta.ops._checks import METRICS
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototypes import prototypes


class FEAT(Head):
    """Class means that a learned attention layer adapts to the other classes of their task.

        A = softmax(c Wq' (c Wk')' / sqrt(D)),    c <- layer_norm(c + fc(A c Wv'))
        logits = -scale * distance(x_q, c_n)

    for each attention head; their outputs are joined. The layer is a set function: an order of
    classes in gives the same order out. It has parameters, which are learned on episodes, and whose
    names are the authors': ``w_qs``, ``w_ks``, ``w_vs``, ``fc``, ``layer_norm``.

    Args:
        features: D.
        heads: number of attention heads, each of width D.
        dropout: probability for the attention and for its output, in ``train()``.
        metric: as in :class:`NearestCentroid`.
        scale: factor of the distances; the paper takes 1 / 64.
        normalize, center: see :class:`Head`.

    Source: Ye, Hu, Zhan, Sha 2020 (arXiv 1812.03664), section 4.1, FEAT by a transformer.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.FEAT(64)
        >>> support, labels = torch.randn(2, 25, 64), torch.arange(5).repeat(2, 5)
        >>> head(support, labels, torch.randn(2, 75, 64)).shape
        torch.Size([2, 75, 5])
    """

    def __init__(
        self,
        features: int,
        heads: int = 1,
        dropout: float = 0.1,
        metric: str = "sqeuclidean",
        scale: float = 1 / 64,
        *,
        normalize: bool = False,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        check_integer("features", features, 1)
        check_integer("heads", heads, 1)
        self.heads = heads
        self.metric = check_choice("metric", metric, METRICS)
        self.scale = check_finite("scale", scale)
        width = heads * features
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(features, width, bias=False) for _ in "qkv")
        for layer in (self.w_qs, self.w_ks, self.w_vs):
            nn.init.normal_(layer.weight, std=features**-0.5)
        self.fc = nn.Linear(width, features)
        nn.init.xavier_normal_(self.fc.weight)
        self.layer_norm = nn.LayerNorm(features)
        self.dropout = nn.Dropout(dropout)

    def adapted(self, centres: Tensor, classes: Tensor | None = None) -> Tensor:
        """Adapt class means ``[T, N, D]`` to those among them with ``classes`` bool ``[T, N]``."""
        count, ways, features = centres.shape
        q, k, v = (
            layer(centres).view(count, ways, self.heads, features).transpose(1, 2)
            for layer in (self.w_qs, self.w_ks, self.w_vs)
        )
        scores = q @ k.mT / features**0.5  # [T, heads, N, N]
        if classes is not None:
            scores = scores.masked_fill(~classes[:, None, None], -torch.inf)
        mixed = self.dropout(scores.softmax(-1)) @ v
        joined = mixed.transpose(1, 2).reshape(count, ways, self.heads * features)
        return self.layer_norm(centres + self.dropout(self.fc(joined)))

    def _logits(self, tasks: Tasks) -> Tensor:
        centres = prototypes(tasks.support, tasks.labels, tasks.num_classes)
        own = self.fc.weight.dtype
        centres = self.adapted(centres.to(own), tasks.classes).to(centres.dtype)
        return -self.scale * pairwise_distance(tasks.query, centres, self.metric)

    def extra_repr(self) -> str:
        return f"{self.fc.out_features}, heads={self.heads}, {super().extra_repr()}"
