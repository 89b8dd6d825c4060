"""Prototypical networks: nearest-class-mean classification in a learned embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT
from fastmeta.core.checks import check_choice, check_dense
from fastmeta.core.module_errors import KINDS, described
from fastmeta.learners._absent import on_present, present_examples
from fastmeta.learners._example_weights import (
    check_weight,
    shares,
    weighted_prototypes,
    without_weightless,
)
from fastmeta.learners.metric._classes import (
    check_present,
    classes_present,
    count_classes,
    number_classes,
    numbers_of,
)
from fastmeta.ops import backend_of
from fastmeta.ops._checks import METRICS, check_mask
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototype_loss import masked_logits, prototype_loss
from fastmeta.ops.prototypes import prototypes

_COMPILED = "labels: expected no -1 in a compiled call, whose encoder sees all examples"


class ProtoNet(nn.Module):
    """Prototypical network on batches of tasks (Snell, Swersky and Zemel, 2017).

    A class is represented by the mean of its support embeddings, its prototype. A query belongs to
    the class with the nearest prototype:
    ``logits = -scale * distance(encoder(query), prototypes)``. The examples of all tasks
    pass through the encoder in one call, so batch norm sees them together: batch statistics in
    ``train()``, running statistics in ``eval()``, as in any module.

    Tasks may have unequal ways, shots and queries: an example of label -1 is absent. The encoder
    does not see it, it belongs to no class, and its gradient is 0. A class without a support
    example in a task has logit minus infinity there. ``torch.compile`` knows no values, and
    compiled calls refuse label -1 when they run.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``; its output is flattened to ``[B, D]``.
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` (1 - cos) or ``"dot"`` (-x.y).
        scale: finite factor of the distances in the logits, an inverse temperature.

    Raises:
        TypeError: ``encoder`` is not a module or ``scale`` not a number.
        ValueError: ``metric`` is unknown or ``scale`` not finite.

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

    def __init__(self, encoder: nn.Module, metric: str = "sqeuclidean", scale: float = 1.0) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected an nn.Module, got {type(encoder).__name__}")
        check_choice("metric", metric, METRICS)
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
        if not abs(scale) < float("inf"):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        self.encoder = encoder
        self.metric = metric
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Embed examples ``[B, ...]`` as ``[B, D]``.

        Raises:
            ValueError: the encoder does not return a tensor with one row an example.
        """
        embedding = self._encode(x)
        if not isinstance(embedding, Tensor) or embedding.shape[:1] != x.shape[:1]:
            got = getattr(embedding, "shape", None) or type(embedding).__name__
            raise ValueError(f"encoder: expected an output [{len(x)}, ...], got {got}")
        if torch.is_autocast_enabled(x.device.type):
            embedding = embedding.float()  # as autocast does for the losses of PyTorch
        return embedding.reshape(len(x), embedding.shape[1:].numel())

    @overload
    def meta_loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        num_classes: int | None = None,
        return_logits: Literal[True] = True,
        relabel: bool = False,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def meta_loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        num_classes: int | None = None,
        *,
        return_logits: Literal[False],
        relabel: bool = False,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> tuple[Tensor, None]: ...

    def meta_loss(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        num_classes: int | None = None,
        return_logits: bool = True,
        relabel: bool = False,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The mean query loss of a batch of tasks, and the logits of the queries.

        ``loss = mean over tasks and queries of logsumexp(logits) - logits[y]`` (Snell et al. 2017,
        eq. 2), through the fused op: no Q x N matrix is kept for the backward pass. With absent
        queries it is the mean over tasks of each task's mean over its present queries, 0 for a task
        without one.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]``, int64, in ``[0, N)``, or -1 for an absent example.
            query_x: ``[T, Q, ...]``, shaped like ``support_x`` after the first two dimensions.
            query_y: ``[T, Q]``, int64, in ``[0, N)``, or -1 for an absent example.
            num_classes: N; ``None``: the largest support label + 1, and no label below it may be
                missing in all tasks.
            return_logits: ``False``: do not compute the logits, and return ``None`` for them.
            relabel: number the classes of each task from 0, in the order of their labels, which
                may then be any numbers of at least 0.
            support_weight, query_weight: floating-point ``[T, S]`` and ``[T, Q]``, of at least 0:
                prototypes are weighted means, and a task's loss is ``sum_b w_b l_b / sum_b w_b``.
                An example of weight 0 is absent, except that the encoder sees it if the weights
                require a gradient. None: all are 1.

        Returns:
            The scalar loss, differentiable in the encoder's parameters and in both inputs, and the
            detached logits ``[T, Q, N]``. A class without a support example in a task has logit
            minus infinity there. The logits of an absent query have no meaning.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit together; a
                query of a class without a support example in its task.
        """
        _check_examples("support", support_x, support_y)
        _check_examples("query", query_x, query_y)
        _check_alike(support_x, query_x)
        for name, weight, y in (
            ("support_weight", support_weight, support_y),
            ("query_weight", query_weight, query_y),
        ):
            if weight is not None:
                check_weight(name, weight, y)
        support_y = without_weightless(support_y, support_weight)
        query_y = without_weightless(query_y, query_weight)
        if relabel:
            classes, support_y = number_classes(support_y)
            query_y = numbers_of(query_y, classes)
        num_classes = count_classes(support_y) if num_classes is None else num_classes
        shots = support_x.shape[1]
        examples = torch.cat([support_x, query_x], dim=1)
        embedding = self._embed_labelled(examples, support_y, query_y)
        support, query = embedding[:, :shots], embedding[:, shots:]
        centres = _centres(support, support_y, num_classes, support_weight)
        present = classes_present(support_y, num_classes, support_weight)
        if present is not None:
            check_present(query_y, present)
        reduction = "mean" if query_weight is None else "none"
        loss = prototype_loss(
            query, query_y, centres, self.metric, self.scale, reduction, present=present
        )
        if query_weight is not None:
            loss = (shares(query_weight, query_y, loss.dtype) * loss).sum(1).mean()
        if not return_logits:
            return loss, None
        with torch.no_grad():
            return loss, self._logits(query, centres, present)

    def adapt_tasks(
        self,
        support_x: Tensor,
        support_y: Tensor,
        steps: int | None = None,
        num_classes: int | None = None,
        relabel: bool = False,
        support_weight: Tensor | None = None,
    ) -> AdaptedProtoNet:
        """Compute every task's prototypes; the result maps queries to logits.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]``, int64, in ``[0, N)``, or -1 for an absent example.
            steps: ``None``: a ProtoNet takes no inner steps; the ``adapt_tasks`` of every learner
                has this argument.
            num_classes, relabel, support_weight: as for ``meta_loss``.

        Returns:
            An :class:`AdaptedProtoNet`, differentiable in the encoder's parameters and the inputs.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit together; or
                ``steps`` that is not ``None``.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> import fastmeta as fm
            >>> learner = fm.ProtoNet(nn.Identity())
            >>> adapted = learner.adapt_tasks(torch.eye(2)[None], torch.tensor([[0, 1]]))
            >>> adapted(torch.tensor([[[0.9, 0.2]]])).argmax(-1)
            tensor([[0]])
        """
        if steps is not None:
            raise ValueError(f"steps: expected None, as a ProtoNet takes no steps, got {steps!r}")
        _check_examples("support", support_x, support_y)
        if support_weight is not None:
            check_weight("support_weight", support_weight, support_y)
        support_y = without_weightless(support_y, support_weight)
        classes = None
        if relabel:
            classes, support_y = number_classes(support_y)
        num_classes = count_classes(support_y) if num_classes is None else num_classes
        support = self._embed_labelled(support_x, support_y)
        centres = _centres(support, support_y, num_classes, support_weight)
        present = classes_present(support_y, num_classes, support_weight)
        return AdaptedProtoNet(centres, self, present, classes)

    def explain(self) -> str:
        """Describe how this learner computes: the encoder call, and the backend of each op."""
        weight = next(self.encoder.parameters(), torch.empty(0))
        used = ("prototypes", "prototype_loss", "pairwise_distance")
        backends = ", ".join(f"{op} {backend_of(op, weight.device, weight.dtype)}" for op in used)
        return (
            f"ProtoNet, {self.metric} distance, scale {self.scale:g}: one encoder call for the "
            f"examples of all tasks, then on {weight.device.type} "
            f"{str(weight.dtype).removeprefix('torch.')}: {backends}."
        )

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, scale={self.scale:g}"

    def _embed_labelled(self, x: Tensor, *labels: Tensor) -> Tensor:
        """Same as ``_embed_tasks``, of the examples that the labels say are present.

        The labels of all sets together are ``[T, B]``.
        """
        if torch.compiler.is_compiling():
            for y in labels:
                torch._assert_async((y != ABSENT).all(), _COMPILED)
        if all(present_examples(y) is None for y in labels):
            return self._embed_tasks(x)
        return self._embed_tasks(x, torch.cat([y != ABSENT for y in labels], dim=1))

    def _embed_tasks(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """``[T, B, ...] -> [T, B, D]`` in one encoder call, 0 for those not ``present`` [T, B]."""
        if present is None:
            return self(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        embedding = on_present(self, x, present)
        if embedding is not None:
            return embedding
        # Joined to the parameters: backward() gives them gradients of 0.
        nothing = sum(0 * p.sum() for p in self.encoder.parameters())
        return x.new_zeros(*present.shape, 1) + nothing

    def _encode(self, x: Tensor) -> Tensor:
        """The encoder's output; an error of it names the layer and the shape that came."""
        if torch.compiler.is_compiling():
            return self.encoder(x)
        try:
            return self.encoder(x)
        except KINDS as error:
            raise described(error, self.encoder, "x", x) from error

    def _logits(self, query: Tensor, centres: Tensor, present: Tensor | None) -> Tensor:
        logits = -self.scale * pairwise_distance(query, centres, metric=self.metric)
        return masked_logits(logits, present)


@dataclass(frozen=True)
class AdaptedProtoNet:
    """The result of :meth:`ProtoNet.adapt_tasks`: one classifier a task.

    Attributes:
        prototypes: ``[T, N, D]``, the class means.
        learner: the :class:`ProtoNet` that embeds the queries.
        present: bool ``[T, N]``, the classes with a support example; ``None``: all of them.
        classes: with ``relabel=True``, the label of each class ``[T, N]``; -1 where a task has
            fewer. Otherwise ``None``.
    """

    prototypes: Tensor
    learner: ProtoNet
    present: Tensor | None = None
    classes: Tensor | None = None

    def __call__(self, query_x: Tensor, present: Tensor | None = None) -> Tensor:
        """Map queries ``[T, Q, ...]`` to logits ``[T, Q, N]``, differentiable.

        Args:
            query_x: ``[T, Q, ...]``.
            present: bool ``[T, Q]``, the queries that the encoder sees; ``None``: all of them. The
                logits of the others have no meaning.

        Raises:
            TypeError: ``query_x`` is not a tensor, or ``present`` not bool.
            ValueError: ``query_x`` has another number of tasks, or ``present`` another shape.
        """
        check_dense("query_x", query_x)
        if query_x.ndim < 3 or len(query_x) != len(self.prototypes):
            shape = list(query_x.shape)
            raise ValueError(
                f"query_x: expected shape [{len(self.prototypes)}, Q, ...], got {shape}"
            )
        if present is not None:
            check_mask("present", present, query_x.shape[:2], query_x.device)
        query = self.learner._embed_tasks(query_x, present)
        return self.learner._logits(query, self.prototypes, self.present)


def _centres(x: Tensor, y: Tensor, num_classes: int, weight: Tensor | None) -> Tensor:
    """The prototypes ``[T, N, D]`` of embeddings ``[T, S, D]``."""
    if weight is None:
        return prototypes(x, y, num_classes)
    return weighted_prototypes(x, y, weight, num_classes)


def _check_examples(name: str, x: Tensor, y: Tensor) -> None:
    for argument, value in ((f"{name}_x", x), (f"{name}_y", y)):
        check_dense(argument, value)
    if x.ndim < 3:
        raise ValueError(f"{name}_x: expected shape [T, examples, ...], got {list(x.shape)}")
    if y.shape != x.shape[:2]:
        raise ValueError(
            f"{name}_y: expected shape {list(x.shape[:2])}, one label an example of {name}_x, "
            f"got {list(y.shape)}{'; use squeeze(-1)' if y.shape == (*x.shape[:2], 1) else ''}"
        )
    if y.dtype != torch.int64:
        raise TypeError(f"{name}_y: expected int64 labels, got {y.dtype}; use long()")


def _check_alike(support_x: Tensor, query_x: Tensor) -> None:
    expected = (len(support_x), *support_x.shape[2:])
    if (len(query_x), *query_x.shape[2:]) != expected:
        tail = ", ".join(str(size) for size in expected[1:])
        raise ValueError(
            f"query_x: expected shape [{expected[0]}, Q, {tail}] as of support_x, "
            f"got {list(query_x.shape)}"
        )
    for attribute, error in (("dtype", TypeError), ("device", ValueError)):
        value, got = getattr(support_x, attribute), getattr(query_x, attribute)
        if value != got:
            raise error(f"query_x: expected support_x's {attribute} {value}, got {got}")
