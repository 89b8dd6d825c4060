"""Matching networks: a query takes its class from the support by attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_choice, check_count, check_positive
from fastmeta.learners._absent import present_examples
from fastmeta.learners.metric._class_losses import cross_entropies
from fastmeta.learners.metric._class_scores import class_scores
from fastmeta.learners.metric._episode_learner import (
    AdaptedEpisodes,
    EpisodeLearner,
    Queries,
    Support,
)
from fastmeta.learners.metric._sequence_order import fixed_order, random_order
from fastmeta.models.full_context import FullContext
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS
from fastmeta.ops.matching_logits import matching_logits
from fastmeta.ops.matching_loss import matching_loss
from fastmeta.ops.pairwise_distance import pairwise_distance


@dataclass(frozen=True)
class AdaptedMatchingNet(AdaptedEpisodes):
    """The result of :meth:`MatchingNet.adapt_tasks`: the embedded support of every task.

    Attributes:
        keys: ``[T, S, D]``, the support embeddings, in the context of their task if the learner has
            one; ``[T, R, S, D]`` if it averages over R orders. 0 for an absent example.
        labels: ``[T, S]``, their classes in ``[0, N)``; -1 for an absent example.
        num_classes: N.
        learner: the :class:`MatchingNet` that embeds the queries.
        weight: the weights of the support ``[T, S]``; ``None``: all are 1.
        present: bool ``[T, N]``, the classes with a support example; ``None``: all of them.
        classes: with ``relabel=True``, the label of each class ``[T, N]``; -1 where a task has
            fewer. Otherwise ``None``.
    """

    keys: Tensor
    labels: Tensor
    num_classes: int
    learner: MatchingNet
    weight: Tensor | None = None
    present: Tensor | None = None
    classes: Tensor | None = None

    def _logits(self, query: Tensor, present: Tensor | None = None) -> Tensor:
        each = [self._log_probabilities(self._read(query, keys), keys) for keys in self._orders()]
        if len(each) == 1:
            return each[0]
        return _normalized(torch.stack(each).mean(0))

    def _orders(self) -> tuple[Tensor, ...]:
        """The keys ``[T, S, D]`` of each order."""
        return (self.keys,) if self.keys.ndim == 3 else self.keys.unbind(1)

    def _read(self, query: Tensor, keys: Tensor) -> Tensor:
        """Queries ``[T, Q, D]`` in the context of the keys ``[T, S, D]``, if there is one."""
        context = self.learner.context
        if context is None:
            return query
        here = None if present_examples(self.labels) is None else self.labels != ABSENT
        read: Tensor = context(query, keys, here)
        return read.to(query.dtype)

    def _log_probabilities(self, query: Tensor, keys: Tensor) -> Tensor:
        """``[T, Q, N]``, minus infinity for a class without a support example."""
        labels, metric, scale = self.labels, self.learner.metric, self.learner._scale()
        if self.weight is None:
            return matching_logits(query, keys, labels, self.num_classes, metric, scale)
        scores = -scale * pairwise_distance(query, keys, metric=metric)
        scores = class_scores(scores, labels, self.num_classes, "logsumexp", self.weight)
        return _normalized(scores)


class MatchingNet(EpisodeLearner[AdaptedMatchingNet]):
    """Matching network on batches of tasks (Vinyals et al., 2016).

    A query attends to the support, ``a = softmax_i(-scale * distance(f(query), g(x_i)))``, and the
    probability of a class is the sum of ``a`` over its examples. Logits are log-probabilities, and
    the loss of a query is minus the logit of its class, exact for any scale. The examples of all
    tasks pass through the encoder in one call, so batch norm sees them together: batch statistics
    in ``train()``, running statistics in ``eval()``, as in any module.

    With ``context``, f and g see the whole support as a sequence: full context embeddings. In
    ``train()`` each task's sequence is a random permutation of its support, drawn from PyTorch's
    generator; in ``eval()`` it is a fixed one that depends on nothing but its length.

    Tasks may have unequal ways, shots and queries: an example of label -1 is absent. The encoder
    does not see it, it gets no attention, and its gradient is 0. A class without a support example
    in a task has logit minus infinity there. ``torch.compile`` knows no values, and compiled calls
    refuse label -1 when they run.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``; its output is flattened to ``[B, D]``.
        metric: ``"cosine"`` (1 - cos), ``"sqeuclidean"``, ``"euclidean"`` or ``"dot"`` (-x.y).
        scale: finite factor of the distances, above 0, an inverse temperature. The paper has 1,
            with which the cosine metric hardly trains: at 20 ways its loss is at least 1.27.
        learn_scale: learn the logarithm of ``scale``, the parameter ``log_scale``.
        context: a :class:`fastmeta.models.FullContext`, or None.
        orders: in ``eval()``, the number of fixed permutations over which log-probabilities are
            averaged; needs a ``context``.
        norm_statistics: what norms with running statistics normalise by in ``eval()``: those, or
            ``"batch"``, the statistics of the examples of a call, which is transductive.
        lower: ``"auto"``: the encoder runs on fastmeta's own CPU kernels where these compute what
            it would, see ``fastmeta.lower``; ``explain()`` says whether. ``False``: in PyTorch.

    Raises:
        TypeError: ``encoder`` is not a module, ``context`` no FullContext, or ``scale`` no number.
        ValueError: an option is unknown or out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastmeta as fm
        >>> learner = fm.MatchingNet(nn.Linear(8, 4), context=fm.models.FullContext(4))
        >>> support_x, query_x = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
        >>> support_y, query_y = torch.arange(3).repeat(2, 1), torch.arange(3).repeat(2, 2)
        >>> loss, logits = learner.meta_loss(support_x, support_y, query_x, query_y)
        >>> loss.backward()
        >>> torch.allclose(logits.exp().sum(2), torch.ones(2, 6))
        True
    """

    _ops = ("matching_loss", "pairwise_distance")

    def __init__(
        self,
        encoder: nn.Module,
        metric: str = "cosine",
        scale: float = 10.0,
        learn_scale: bool = False,
        context: FullContext | None = None,
        orders: int = 1,
        norm_statistics: str = "running",
        lower: str | bool = "auto",
    ) -> None:
        super().__init__(encoder, norm_statistics, lower)
        check_choice("metric", metric, METRICS)
        check_positive("scale", scale)
        if context is not None and not isinstance(context, FullContext):
            raise TypeError(f"context: expected a FullContext, got {type(context).__name__}")
        check_count("orders", orders, least=1)
        if context is None and orders != 1:
            raise ValueError(f"orders: expected 1 without a context, got {orders}")
        self.metric = metric
        self.context = context
        self.orders = orders
        self._constant = float(scale)
        self.register_parameter("log_scale", None)
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> float:
        """The factor of the distances, learned or not."""
        return self._constant if self.log_scale is None else float(self.log_scale.detach().exp())

    def forward(self, x: Tensor) -> Tensor:
        """Embed examples ``[B, ...]`` as ``[B, D]``, without their context.

        Raises:
            ValueError: the encoder does not return a tensor with one row an example, or no rows
                that the context takes.
        """
        embedding = super().forward(x)
        if self.context is not None and embedding.shape[1] != self.context.dim:
            raise ValueError(
                f"context: expected dim {embedding.shape[1]}, the width of the encoder's output, "
                f"got {self.context.dim}"
            )
        return embedding

    def extra_repr(self) -> str:
        learned = ", learned" if self.log_scale is not None else ""
        orders = f", orders={self.orders}" if self.context is not None else ""
        return f"metric={self.metric!r}, scale={self.scale:g}{learned}{orders}"

    def _description(self) -> str:
        reads = "" if self.context is None else f", context of {self.context.steps} reads"
        return f"{self.metric} distance, scale {self.scale:g}{reads}"

    def _row_shape(self, x: Tensor) -> tuple[int, ...]:
        return (1 if self.context is None else self.context.dim,)

    def _scale(self) -> Tensor | float:
        return self._constant if self.log_scale is None else self.log_scale.exp()

    def _adapted(self, support: Support) -> AdaptedMatchingNet:
        x, y, num_classes, weight = support[:4]
        reference.check_label_range(y, num_classes, "support_y")
        keys = x if self.context is None else self._keys(self.context, support)
        rest = support.present, support.classes
        return AdaptedMatchingNet(keys, y, num_classes, self, weight, *rest)

    def _keys(self, context: FullContext, support: Support) -> Tensor:
        """The support in the context of its task, ``[T, S, D]`` or ``[T, orders, S, D]``."""
        x, y = support.x, support.y
        if support.weight is not None:
            raise ValueError("support_weight: expected None with a context, which has no weights")
        lengths = None if present_examples(y) is None else (y != ABSENT).sum(1)
        if self.training:
            orders = [random_order(y)]
        else:
            orders = [fixed_order(y, number) for number in range(self.orders)]
        keys = [context.keys(x, order, lengths).to(x.dtype) for order in orders]
        return keys[0] if len(keys) == 1 else torch.stack(keys, dim=1)

    def _score(
        self, adapted: AdaptedMatchingNet, support: Support, queries: Queries, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        if adapted.keys.ndim == 4 or adapted.weight is not None:
            logits = adapted._logits(queries.x)
            loss = queries.mean(cross_entropies(logits, queries.y))
            return loss, logits.detach() if return_logits else None
        # Through the fused op: no Q x S matrix is kept for the backward pass.
        query, keys = adapted._read(queries.x, adapted.keys), adapted.keys
        reduction = "mean" if queries.weight is None else "none"
        options = self.metric, self._scale(), reduction
        loss = matching_loss(query, queries.y, keys, support.y, *options)
        if queries.weight is not None:
            loss = queries.mean(loss)
        if not return_logits:
            return loss, None
        with torch.no_grad():
            return loss, adapted._log_probabilities(query, keys)


def _normalized(logits: Tensor) -> Tensor:
    """Log-probabilities ``[T, Q, N]``; minus infinity for all classes of a task without support."""
    nothing = (logits == -torch.inf).all(2, keepdim=True)
    return logits.masked_fill(nothing, 0).log_softmax(2).masked_fill(nothing, -torch.inf)
