"""Prototypical networks: nearest-class-mean classification in a learned embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmeta.core.checks import check_choice
from fastmeta.learners._example_weights import weighted_prototypes
from fastmeta.learners.metric._episode_learner import (
    AdaptedEpisodes,
    EpisodeLearner,
    Queries,
    Support,
)
from fastmeta.ops._checks import METRICS
from fastmeta.ops.mahalanobis import class_covariances, mahalanobis_distance
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototype_loss import loss_of_logits, masked_logits, prototype_loss
from fastmeta.ops.prototypes import prototypes

MAHALANOBIS = "mahalanobis"


@dataclass(frozen=True)
class AdaptedProtoNet(AdaptedEpisodes):
    """The result of :meth:`ProtoNet.adapt_tasks`: one classifier a task.

    Attributes:
        prototypes: ``[T, N, D]``, the class means.
        learner: the :class:`ProtoNet` that embeds the queries.
        present: bool ``[T, N]``, the classes with a support example; ``None``: all of them.
        classes: with ``relabel=True``, the label of each class ``[T, N]``; -1 where a task has
            fewer. Otherwise ``None``.
        covariances: ``[T, N, D, D]`` with metric ``"mahalanobis"``. Otherwise ``None``.
    """

    prototypes: Tensor
    learner: ProtoNet
    present: Tensor | None = None
    classes: Tensor | None = None
    covariances: Tensor | None = None

    def _logits(self, query: Tensor, present: Tensor | None = None) -> Tensor:
        learner = self.learner
        if self.covariances is None:
            distance = pairwise_distance(query, self.prototypes, metric=learner.metric)
        else:
            distance = mahalanobis_distance(query, self.prototypes, self.covariances)
        return masked_logits(-learner.scale * distance, self.present)


class ProtoNet(EpisodeLearner[AdaptedProtoNet]):
    """Prototypical network on batches of tasks (Snell, Swersky and Zemel, 2017).

    A class is represented by the mean of its support embeddings, its prototype. A query belongs to
    the class with the nearest prototype:
    ``logits = -scale * distance(encoder(query), prototypes)``, and the loss of a query is
    ``logsumexp(logits) - logits[y]`` (eq. 2). Weighted support examples make weighted means. The
    examples of all tasks pass through the encoder in one call, so batch norm sees them together:
    batch statistics in ``train()``, running statistics in ``eval()``, as in any module.

    Tasks may have unequal ways, shots and queries: an example of label -1 is absent. The encoder
    does not see it, it belongs to no class, and its gradient is 0. A class without a support
    example in a task has logit minus infinity there. ``torch.compile`` knows no values, and
    compiled calls refuse label -1 when they run.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``; its output is flattened to ``[B, D]``.
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` (1 - cos), ``"dot"`` (-x.y), or
            ``"mahalanobis"``: squared, by ``class_covariances`` of the support examples, as in
            Simple CNAPS. It takes no support weights, and memory O(T N D (S + Q + D)).
        scale: finite factor of the distances in the logits, an inverse temperature.
        norm_statistics: what norms with running statistics normalise by in ``eval()``: those, or
            ``"batch"``, the statistics of the examples of a call, which is transductive.
        lower: ``"auto"``: the encoder runs on fastmeta's own CPU kernels where these compute what
            it would, see ``fastmeta.lower``; ``explain()`` says whether. ``False``: in PyTorch.
        ridge, max_share: options of ``class_covariances``, for ``"mahalanobis"``.

    Raises:
        TypeError: ``encoder`` is not a module or ``scale`` not a number.
        ValueError: ``metric``, ``norm_statistics`` or ``lower`` is unknown, or ``scale`` not
            finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastmeta as fm
        >>> learner = fm.ProtoNet(nn.Linear(8, 4))
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
        metric: str = "sqeuclidean",
        scale: float = 1.0,
        norm_statistics: str = "running",
        lower: str | bool = "auto",
        ridge: float = 1.0,
        max_share: float = 1.0,
    ) -> None:
        super().__init__(encoder, norm_statistics, lower)
        check_choice("metric", metric, (*METRICS, MAHALANOBIS))
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
        if not abs(scale) < float("inf"):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        self.metric = metric
        self.scale = float(scale)
        self.ridge, self.max_share = ridge, max_share
        self._ops = ("prototypes",)
        if metric != MAHALANOBIS:
            self._ops += ("prototype_loss", "pairwise_distance")

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, scale={self.scale:g}"

    def _description(self) -> str:
        return f"{self.metric} distance, scale {self.scale:g}"

    def _adapted(self, support: Support) -> AdaptedProtoNet:
        x, y, num_classes, weight = support[:4]
        if weight is None:
            centres = prototypes(x, y, num_classes)
        else:
            centres = weighted_prototypes(x, y, weight, num_classes)
        covariances = self._covariances(support)
        return AdaptedProtoNet(centres, self, support.present, support.classes, covariances)

    def _covariances(self, support: Support) -> Tensor | None:
        """The covariances ``[T, N, D, D]`` of the classes, for the metric that has them."""
        if self.metric != MAHALANOBIS:
            return None
        if support.weight is not None:
            raise ValueError("support_weight: expected None with metric mahalanobis")
        return class_covariances(
            support.x, support.y, support.num_classes, self.ridge, self.max_share
        )

    def _score(
        self, adapted: AdaptedProtoNet, support: Support, queries: Queries, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        if adapted.covariances is not None:
            logits = adapted._logits(queries.x)
            loss = queries.mean(loss_of_logits(logits, queries.y))
            return loss, logits.detach() if return_logits else None
        # Through the fused op: no Q x N matrix is kept for the backward pass.
        reduction = "mean" if queries.weight is None else "none"
        loss = prototype_loss(
            queries.x,
            queries.y,
            adapted.prototypes,
            self.metric,
            self.scale,
            reduction,
            present=support.present,
        )
        if queries.weight is not None:
            loss = queries.mean(loss)
        if not return_logits:
            return loss, None
        with torch.no_grad():
            return loss, adapted._logits(queries.x)
