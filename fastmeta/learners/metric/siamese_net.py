"""Siamese networks: are two examples of the same class?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_choice, check_count, check_number
from fastmeta.learners.metric._class_scores import REDUCTIONS, class_scores
from fastmeta.learners.metric._episode_learner import (
    AdaptedEpisodes,
    EpisodeLearner,
    Queries,
    Support,
)
from fastmeta.ops import reference
from fastmeta.ops.pair_scores import pair_scores
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototype_loss import masked_logits

LOSSES, PAIRS = ("bce", "contrastive"), ("all",)


@dataclass(frozen=True)
class AdaptedSiameseNet(AdaptedEpisodes):
    """The result of :meth:`SiameseNet.adapt_tasks`: the embedded support of every task.

    Attributes:
        keys: ``[T, S, D]``, the support embeddings; 0 for an absent example.
        labels: ``[T, S]``, their classes in ``[0, N)``; -1 for an absent example.
        num_classes: N.
        learner: the :class:`SiameseNet` that embeds the queries and compares.
        weight: the weights of the support ``[T, S]``; ``None``: all are 1.
        present: bool ``[T, N]``, the classes with a support example; ``None``: all of them.
        classes: with ``relabel=True``, the label of each class ``[T, N]``; -1 where a task has
            fewer. Otherwise ``None``.
    """

    keys: Tensor
    labels: Tensor
    num_classes: int
    learner: SiameseNet
    weight: Tensor | None = None
    present: Tensor | None = None
    classes: Tensor | None = None

    def _logits(self, query: Tensor, present: Tensor | None = None) -> Tensor:
        return self._of_classes(self.learner._similarity(query, self.keys))

    def _of_classes(self, similarity: Tensor) -> Tensor:
        """Logits ``[T, Q, N]`` from the similarities to the support ``[T, Q, S]``."""
        reduce = self.learner.reduce
        scores = class_scores(similarity, self.labels, self.num_classes, reduce, self.weight)
        return masked_logits(scores, self.present)


class SiameseNet(EpisodeLearner[AdaptedSiameseNet]):
    """Siamese network on batches of tasks (Koch, Zemel and Salakhutdinov, 2015).

    The similarity of two examples is ``sum_d weight_d |h(a)_d - h(b)_d| + bias``, whose sigmoid is
    the probability that they are of the same class. With ``loss="contrastive"`` (Hadsell et al.,
    2006) it is minus the Euclidean distance d, and the loss of a pair is ``d^2`` if the classes are
    the same and ``max(0, margin - d)^2`` if not.

    The loss is over all pairs of an episode: queries with support, and support with support without
    the pairs of an example with itself; the latter count twice, as (a, b) and (b, a). Pairs of the
    same class have half the mass of a task's loss, the others the other half. That is the
    expectation of a loss of sampled pairs, half of them of the same class, from one encoding of
    each example. The logit of a class is the largest similarity to its support examples, their mean
    or their logsumexp.

    Tasks may have unequal ways, shots and queries: an example of label -1 is absent. The encoder
    does not see it, it is in no pair, and its gradient is 0. A class without a support example in a
    task has logit minus infinity there. The weight of a pair is the product of the weights of its
    examples. ``torch.compile`` knows no values, and compiled calls refuse label -1 when they run.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``; its output is flattened to ``[B, D]``.
        dim: D.
        loss: ``"bce"``, the binary cross entropy of the probability, or ``"contrastive"``.
        margin: distance from which pairs of two classes have no loss; contrastive only.
        reduce: ``"max"``, ``"mean"`` or ``"logsumexp"`` over the support examples of a class.
        pairs: ``"all"`` pairs of an episode.
        norm_statistics: what norms with running statistics normalise by in ``eval()``: those, or
            ``"batch"``, the statistics of the examples of a call, which is transductive.
        lower: ``"auto"``: the encoder runs on fastmeta's own CPU kernels where these compute what
            it would, see ``fastmeta.lower``; ``explain()`` says whether. ``False``: in PyTorch.

    Raises:
        TypeError: ``encoder`` is not a module, or an option of another type.
        ValueError: an option is unknown or out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastmeta as fm
        >>> learner = fm.SiameseNet(nn.Linear(8, 4), dim=4)
        >>> support_x, query_x = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
        >>> support_y, query_y = torch.arange(3).repeat(2, 1), torch.arange(3).repeat(2, 2)
        >>> loss, logits = learner.meta_loss(support_x, support_y, query_x, query_y)
        >>> loss.backward()
        >>> logits.shape
        torch.Size([2, 6, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        loss: str = "bce",
        margin: float = 1.0,
        reduce: str = "max",
        pairs: str = "all",
        norm_statistics: str = "running",
        lower: str | bool = "auto",
    ) -> None:
        super().__init__(encoder, norm_statistics, lower)
        self.dim = check_count("dim", dim, least=1)
        self.loss = check_choice("loss", loss, LOSSES)
        self.margin = check_number("margin", margin)
        self.reduce = check_choice("reduce", reduce, REDUCTIONS)
        self.pairs = check_choice("pairs", pairs, PAIRS)
        self._ops = ("pair_scores",) if loss == "bce" else ("pairwise_distance",)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if loss == "bce":
            # Near examples are similar from the start.
            self.weight = nn.Parameter(torch.full((dim,), -(dim**-0.5)))
            self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Embed examples ``[B, ...]`` as ``[B, D]``.

        Raises:
            ValueError: the encoder does not return a tensor with one row of D numbers an example.
        """
        embedding = super().forward(x)
        if embedding.shape[1] != self.dim:
            raise ValueError(
                f"dim: expected the encoder's output width {embedding.shape[1]}, got {self.dim}"
            )
        return embedding

    def extra_repr(self) -> str:
        return f"dim={self.dim}, loss={self.loss!r}, margin={self.margin:g}, reduce={self.reduce!r}"

    def _description(self) -> str:
        margin = f" with margin {self.margin:g}" if self.loss == "contrastive" else ""
        return f"{self.loss} loss{margin} of all pairs, {self.reduce} of shots"

    def _row_shape(self, x: Tensor) -> tuple[int, ...]:
        return (self.dim,)

    def _similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """``[T, A, D]``, ``[T, B, D]`` -> ``[T, A, B]``."""
        if self.weight is None or self.bias is None:
            return -pairwise_distance(x, y, metric="euclidean")
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return pair_scores(x, y, weight, bias, activation="abs")

    def _losses(self, similarity: Tensor, same: Tensor) -> Tensor:
        """The loss of each pair."""
        if self.loss == "bce":
            return F.softplus(torch.where(same, -similarity, similarity))
        distance = -similarity
        return torch.where(same, distance, F.relu(self.margin - distance)).square()

    def _adapted(self, support: Support) -> AdaptedSiameseNet:
        x, y, num_classes, weight = support[:4]
        reference.check_label_range(y, num_classes, "support_y")
        rest = support.present, support.classes
        return AdaptedSiameseNet(x, y, num_classes, self, weight, *rest)

    def _score(
        self, adapted: AdaptedSiameseNet, support: Support, queries: Queries, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        reference.check_label_range(queries.y, support.num_classes, "query_y")
        shots = support.x.shape[1]
        similarity = self._similarity(torch.cat([support.x, queries.x], dim=1), support.x)
        same = torch.cat([support.y, queries.y], dim=1).unsqueeze(2) == support.y.unsqueeze(1)
        losses, mass = self._losses(similarity, same), _mass(support, queries)
        loss = (_means(losses, mass * same) + _means(losses, mass * ~same)).mean() / 2
        if not return_logits:
            return loss, None
        with torch.no_grad():
            return loss, adapted._of_classes(similarity[:, shots:].detach())


def _mass(support: Support, queries: Queries) -> Tensor:
    """The weight of each pair ``[T, S + Q, S]``; 0 for absent examples and for one with itself."""
    each = torch.cat([_weights(support), _weights(queries)], dim=1).to(support.x.dtype)
    shots = support.y.shape[1]
    place = torch.arange(each.shape[1], device=each.device)
    others = place.unsqueeze(1) != place[:shots]
    return each.unsqueeze(2) * each[:, :shots].unsqueeze(1) * others


def _weights(examples: Support | Queries) -> Tensor:
    if examples.weight is None:
        return examples.y != ABSENT
    return examples.weight.masked_fill(examples.y == ABSENT, 0)


def _means(losses: Tensor, mass: Tensor) -> Tensor:
    """The mean loss of each task's pairs by their mass, ``[T]``; 0 without any."""
    total = mass.sum((1, 2))
    return (mass * losses).sum((1, 2)) / torch.where(total == 0, 1, total)
