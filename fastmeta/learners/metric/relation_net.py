"""Relation networks: a learned comparison of queries with the classes of their task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_choice
from fastmeta.learners._absent import present_examples
from fastmeta.learners._example_weights import weighted_prototypes
from fastmeta.learners.metric._class_losses import cross_entropies, squared_errors
from fastmeta.learners.metric._episode_learner import (
    AdaptedEpisodes,
    EpisodeLearner,
    Queries,
    Support,
)
from fastmeta.models.relation import (
    RelationEncoder,
    RelationMLP,
    RelationModule,
    concatenated_scores,
    needs_batch,
)
from fastmeta.ops.prototype_loss import masked_logits
from fastmeta.ops.prototypes import prototypes

LOSSES, AGGREGATES = ("mse", "cross_entropy"), ("sum", "mean")

_COMPILED = (
    "support_y: expected every class in every task in a compiled call of a RelationNet whose norms "
    "take the statistics of all pairs"
)


@dataclass(frozen=True)
class AdaptedRelationNet(AdaptedEpisodes):
    """The result of :meth:`RelationNet.adapt_tasks`: the classes of every task.

    Attributes:
        maps: ``[T, N, ...]``, the sum or the mean of the embeddings of each class.
        learner: the :class:`RelationNet` that embeds the queries and scores them.
        present: bool ``[T, N]``, the classes with a support example; ``None``: all of them.
        classes: with ``relabel=True``, the label of each class ``[T, N]``; -1 where a task has
            fewer. Otherwise ``None``.
    """

    maps: Tensor
    learner: RelationNet
    present: Tensor | None = None
    classes: Tensor | None = None

    def _logits(self, query: Tensor, present: Tensor | None = None) -> Tensor:
        scores = self.learner._relations(query, self.maps, present, self.present)
        return masked_logits(scores, self.present)


class RelationNet(EpisodeLearner[AdaptedRelationNet]):
    """Relation network on batches of tasks (Sung et al., 2018).

    A class is the element-wise sum of its support's feature maps. A second network, the relation
    module, scores each query with each class; a query belongs to the class with the highest score.
    Logits are these scores ahead of the sigmoid: the published loss is the squared error of
    ``sigmoid(logits)`` to one-hot labels, mean over queries and classes.

    A relation module with a method ``pairs(x [T, Q, ...], y [T, N, ...]) -> [T, Q, N]``, such as
    :class:`fastmeta.models.RelationModule`, never sees a concatenation. Any other module gets
    ``cat(class, query)`` of all pairs along dimension 1, ``[B, 2 C, ...]``, and gives ``[B]``; so
    does every module if its batch norms take statistics and some queries or classes are absent.
    The examples of all tasks pass through the encoder in one call, and all pairs are one batch to
    the relation module's norms.

    Tasks may have unequal ways, shots and queries: an example of label -1 is absent. No norm sees
    it, it belongs to no class, and its gradient is 0. A class without a support example in a task
    has logit minus infinity there. ``torch.compile`` knows no values, and compiled calls refuse
    label -1 when they run.

    Args:
        encoder: any module ``[B, ...] -> [B, C, ...]``, maps or vectors, that fits the relation
            module.
        relation: the relation module, without a last sigmoid. ``None``:
            ``fastmeta.models.RelationModule(channels)`` for images of 28 x 28 pixels and the
            ``channels`` of a :class:`fastmeta.models.RelationEncoder`.
        loss: ``"mse"``, or ``"cross_entropy"`` of the scores without a sigmoid.
        aggregate: ``"sum"`` or ``"mean"`` of the embeddings of a class; weights count in both.
        norm_statistics: what norms with running statistics normalise by in ``eval()``: those, or
            ``"batch"``, the statistics of the examples of a call, as the paper's own code does:
            transductive, and several points better. Never compare one with the other.
        lower: ``"auto"``: the encoder runs on fastmeta's own CPU kernels where these compute what
            it would, see ``fastmeta.lower``; ``explain()`` says whether. ``False``: in PyTorch.

    Raises:
        TypeError: ``encoder`` or ``relation`` is not a module.
        ValueError: an option is unknown; or ``relation`` is left out for another encoder.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> learner = fm.RelationNet(fm.models.RelationEncoder(hidden=4))
        >>> support_x, query_x = torch.randn(2, 3, 1, 28, 28), torch.randn(2, 6, 1, 28, 28)
        >>> support_y, query_y = torch.arange(3).repeat(2, 1), torch.arange(3).repeat(2, 2)
        >>> loss, logits = learner.meta_loss(support_x, support_y, query_x, query_y)
        >>> loss.backward()
        >>> logits.shape
        torch.Size([2, 6, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        relation: nn.Module | None = None,
        loss: str = "mse",
        aggregate: str = "sum",
        norm_statistics: str = "running",
        lower: str | bool = "auto",
    ) -> None:
        super().__init__(encoder, norm_statistics, lower)
        if relation is None:
            if not isinstance(encoder, RelationEncoder):
                raise ValueError(
                    "relation: expected a module, as the encoder is a "
                    f"{type(encoder).__name__} and no RelationEncoder, got None"
                )
            relation = RelationModule(encoder.channels)
        if not isinstance(relation, nn.Module):
            raise TypeError(f"relation: expected an nn.Module, got {type(relation).__name__}")
        own = {RelationModule: ("pair_pool",), RelationMLP: ("pair_scores",)}
        self._ops = ("prototypes", *own.get(type(relation), ()))
        self.relation = relation
        self.loss = check_choice("loss", loss, LOSSES)
        self.aggregate = check_choice("aggregate", aggregate, AGGREGATES)

    def forward(self, x: Tensor) -> Tensor:
        """Embed examples ``[B, ...]`` as maps ``[B, C, H, W]``, or as the encoder gives them.

        Raises:
            ValueError: the encoder does not return a tensor with one row an example, or no maps
                that the relation module takes.
        """
        embedding = self._encode(x)
        if isinstance(self.relation, RelationModule):
            size = self.relation.image_size
            expected = self.relation.channels, size, size
            if embedding.shape[1:] != expected:
                raise ValueError(
                    f"encoder: expected maps [B, C, H, W] of {list(expected)} for the relation "
                    f"module, got {list(embedding.shape)}"
                )
        elif embedding.ndim < 2:
            raise ValueError(
                f"encoder: expected embeddings [B, C, ...], got {list(embedding.shape)}"
            )
        return embedding

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, aggregate={self.aggregate!r}"

    def _description(self) -> str:
        form = "pairs" if hasattr(self.relation, "pairs") else "concatenations"
        return (
            f"{self.loss} loss, {self.aggregate} of shots, {type(self.relation).__name__} on {form}"
        )

    def _row_shape(self, x: Tensor) -> tuple[int, ...]:
        if isinstance(self.relation, RelationModule):
            size = self.relation.image_size
            return self.relation.channels, size, size
        raise ValueError("support_y and query_y: expected a present example, got none")

    def _adapted(self, support: Support) -> AdaptedRelationNet:
        x, y, num_classes, weight = support[:4]
        rows = x.flatten(2)
        if weight is None:
            maps = prototypes(rows, y, num_classes)
        else:
            maps = weighted_prototypes(rows, y, weight, num_classes)
        if self.aggregate == "sum":
            each = torch.ones_like(y) if weight is None else weight
            maps = maps * _totals(y, each.to(maps.dtype), num_classes)
        maps = maps.unflatten(2, x.shape[2:])
        return AdaptedRelationNet(maps, self, support.present, support.classes)

    def _score(
        self, adapted: AdaptedRelationNet, support: Support, queries: Queries, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        here = present_examples(queries.y)
        scores = self._relations(queries.x, adapted.maps, here, support.present)
        if self.loss == "mse":
            losses = squared_errors(scores, queries.y, support.present)
        else:
            losses = cross_entropies(masked_logits(scores, support.present), queries.y)
        logits = masked_logits(scores.detach(), support.present) if return_logits else None
        return queries.mean(losses), logits

    def _relations(
        self, query: Tensor, maps: Tensor, queries: Tensor | None, classes: Tensor | None
    ) -> Tensor:
        """Scores ``[T, Q, N]``; ``queries`` and ``classes`` are those present, None: all."""
        present = None
        if queries is not None or classes is not None:
            everything = torch.ones((), dtype=torch.bool, device=query.device)
            each = everything if queries is None else queries.unsqueeze(2)
            other = everything if classes is None else classes.unsqueeze(1)
            present = (each & other).expand(*query.shape[:2], maps.shape[1])
        with self._statistics(self.relation):
            scores = self._scores(query, maps, present)
        return scores.float() if torch.is_autocast_enabled(query.device.type) else scores

    def _scores(self, query: Tensor, maps: Tensor, present: Tensor | None) -> Tensor:
        relation = self.relation
        if present is not None and not needs_batch(relation):
            present = None  # what a module makes of an absent pair reaches no other
        elif present is not None and torch.compiler.is_compiling():
            torch._assert_async(present.all(), _COMPILED)
            present = None
        if present is None and hasattr(relation, "pairs"):
            pairs = cast("Callable[[Tensor, Tensor], Tensor]", relation.pairs)
            return pairs(query, maps)
        return concatenated_scores(relation, query, maps, present)


def _totals(y: Tensor, each: Tensor, num_classes: int) -> Tensor:
    """The sum of ``each`` ``[T, S]`` over the examples of each class, ``[T, N, 1]``."""
    # One class more, of the absent examples.
    classes = y.masked_fill(y == ABSENT, num_classes)
    totals = each.new_zeros(len(y), num_classes + 1).scatter_add(1, classes, each)
    return totals[:, :num_classes].unsqueeze(2)
