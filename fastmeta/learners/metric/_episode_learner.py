"""The base of learners that compare the embeddings of queries and support."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastmeta.core.absence import ABSENT, mean_over_present
from fastmeta.core.backend import backend_of
from fastmeta.core.checks import check_choice, check_dense
from fastmeta.core.module_errors import KINDS, described
from fastmeta.core.norm_statistics import tracking_norms, without_running_statistics
from fastmeta.engines.base import NORM_STATISTICS
from fastmeta.engines.program.encoder import EncoderEngine, check_lower
from fastmeta.learners._absent import on_present, present_examples
from fastmeta.learners._example_weights import check_weight, shares, without_weightless
from fastmeta.learners.metric._classes import (
    check_present,
    classes_present,
    count_classes,
    number_classes,
    numbers_of,
)
from fastmeta.learners.metric._episode_checks import check_alike, check_examples
from fastmeta.ops._checks import check_mask

_COMPILED = "labels: expected no -1 in a compiled call, whose encoder sees all examples"

_TRANSDUCTIVE = (
    " Transductive: in eval() too, norms take the statistics of the examples of a call, so that "
    "the score of a query depends on the others."
)


class Support(NamedTuple):
    """The embedded support of a batch of tasks.

    Attributes:
        x: embeddings ``[T, S, ...]``, 0 for absent examples.
        y: labels ``[T, S]``, in [0, N), or ABSENT.
        num_classes: N.
        weight: ``[T, S]``; None: all are 1.
        present: bool ``[T, N]``, the classes with a support example; None: all of them.
        classes: the label of each class ``[T, N]`` if they were numbered anew; else None.
    """

    x: Tensor
    y: Tensor
    num_classes: int
    weight: Tensor | None
    present: Tensor | None
    classes: Tensor | None


class Queries(NamedTuple):
    """The embedded queries of a batch of tasks.

    Attributes:
        x: embeddings ``[T, Q, ...]``, 0 for absent queries.
        y: labels ``[T, Q]``, in [0, N), or ABSENT.
        weight: ``[T, Q]``; None: all are 1.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over tasks of the mean of ``losses`` ``[T, Q]`` over the queries, by weight.

        ``losses`` are 0 at absent queries.
        """
        if self.weight is None:
            return mean_over_present(losses, self.y)
        return (shares(self.weight, self.y, losses.dtype) * losses).sum(1).mean()


class AdaptedEpisodes:
    """Base of what ``adapt_tasks`` returns: frozen dataclasses whose tensors lead with tasks."""

    learner: EpisodeLearner[Any]

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
        if query_x.ndim < 3 or len(query_x) != len(self):
            shape = list(query_x.shape)
            raise ValueError(f"query_x: expected shape [{len(self)}, Q, ...], got {shape}")
        if present is not None:
            check_mask("present", present, query_x.shape[:2], query_x.device)
        return self._logits(self.learner._embed_tasks(query_x, present), present)

    def __len__(self) -> int:
        return len(next(tensor for _, tensor in self._tensors()))

    def task(self, index: int) -> Self:
        """The same of one task, for queries ``[1, Q, ...]``.

        Raises:
            IndexError: there is no such task.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a task of {len(self)}, got {index}")
        place = index % len(self)
        rows = {name: tensor[place : place + 1] for name, tensor in self._tensors()}
        return dataclasses.replace(self, **rows)  # type: ignore[type-var]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]

    def _logits(self, query: Tensor, present: Tensor | None) -> Tensor:
        """Logits ``[T, Q, N]`` of embedded queries."""
        raise NotImplementedError(f"{type(self).__name__} has no _logits")


Adapted = TypeVar("Adapted", bound=AdaptedEpisodes)


class EpisodeLearner(nn.Module, Generic[Adapted]):
    """Base of learners without inner steps, which embed all examples of all tasks in one call.

    A learner says what it makes of the support (``_adapted``) and how it scores queries against
    it (``_score``). The base checks the examples, leaves absent ones out of the encoder's call,
    counts or numbers the classes, and applies the choice of the norms' statistics.

    Args:
        encoder: any module ``[B, ...] -> [B, ...]``.
        norm_statistics: what norms with running statistics normalise by in ``eval()``:
            ``"running"``, as any module does, or ``"batch"``, the statistics of the examples of a
            call. In ``train()`` it is the batch in any case.
        lower: ``"auto"``: the encoder runs on fastmeta's own CPU kernels where these compute what
            it would, see ``fastmeta.lower``; ``explain()`` says whether. ``False``: in PyTorch, as
            with ``norm_statistics="batch"``.

    Raises:
        TypeError: ``encoder`` is not a module.
        ValueError: ``norm_statistics`` or ``lower`` is unknown.
    """

    _ops: tuple[str, ...] = ()  # that explain() names

    def __init__(
        self,
        encoder: nn.Module,
        norm_statistics: str = "running",
        lower: str | bool = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected an nn.Module, got {type(encoder).__name__}")
        check_choice("norm_statistics", norm_statistics, NORM_STATISTICS)
        self.encoder = encoder
        self.norm_statistics = norm_statistics
        self.lower = check_lower(lower)
        self._engine = EncoderEngine()

    def forward(self, x: Tensor) -> Tensor:
        """Embed examples ``[B, ...]`` as ``[B, D]``.

        Raises:
            ValueError: the encoder does not return a tensor with one row an example.
        """
        embedding = self._encode(x)
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

        With absent queries the loss is the mean over tasks of each task's mean over its present
        queries, 0 for a task without one.

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
                a support example counts as ``w_b`` examples, and a task's loss is
                ``sum_b w_b l_b / sum_b w_b``. An example of weight 0 is absent, except that the
                encoder sees it if the weights require a gradient. None: all are 1.

        Returns:
            The scalar loss, differentiable in the learner's parameters and in both inputs, and the
            detached logits ``[T, Q, N]``. A class without a support example in a task has logit
            minus infinity there. The logits of an absent query have no meaning.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit together; a
                query of a class without a support example in its task.
        """
        check_examples("support", support_x, support_y)
        check_examples("query", query_x, query_y)
        check_alike(support_x, query_x)
        for name, weight, y in (
            ("support_weight", support_weight, support_y),
            ("query_weight", query_weight, query_y),
        ):
            if weight is not None:
                check_weight(name, weight, y)
        support_y = without_weightless(support_y, support_weight)
        query_y = without_weightless(query_y, query_weight)
        classes = None
        if relabel:
            classes, support_y = number_classes(support_y)
            query_y = numbers_of(query_y, classes)
        num_classes = count_classes(support_y) if num_classes is None else num_classes
        shots = support_x.shape[1]
        examples = torch.cat([support_x, query_x], dim=1)
        embedding = self._embed_labelled(examples, support_y, query_y)
        rows = embedding[:, :shots]
        support = self._support(rows, support_y, num_classes, support_weight, classes)
        adapted = self._adapted(support)
        if support.present is not None:
            check_present(query_y, support.present)
        queries = Queries(embedding[:, shots:], query_y, query_weight)
        return self._score(adapted, support, queries, return_logits)

    def adapt_tasks(
        self,
        support_x: Tensor,
        support_y: Tensor,
        steps: int | None = None,
        num_classes: int | None = None,
        relabel: bool = False,
        support_weight: Tensor | None = None,
    ) -> Adapted:
        """Compute what the support of every task costs; the result maps queries to logits.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S]``, int64, in ``[0, N)``, or -1 for an absent example.
            steps: ``None``: there are no inner steps to take; the ``adapt_tasks`` of every learner
                has this argument.
            num_classes, relabel, support_weight: as for ``meta_loss``.

        Returns:
            A frozen dataclass, callable on queries ``[T, Q, ...]``, differentiable in the learner's
            parameters and the inputs.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit together; or
                ``steps`` that is not ``None``.
        """
        if steps is not None:
            name = type(self).__name__
            raise ValueError(
                f"steps: expected None, as a {name} takes no inner steps, got {steps!r}"
            )
        check_examples("support", support_x, support_y)
        if support_weight is not None:
            check_weight("support_weight", support_weight, support_y)
        support_y = without_weightless(support_y, support_weight)
        classes = None
        if relabel:
            classes, support_y = number_classes(support_y)
        num_classes = count_classes(support_y) if num_classes is None else num_classes
        rows = self._embed_labelled(support_x, support_y)
        return self._adapted(self._support(rows, support_y, num_classes, support_weight, classes))

    @property
    def is_transductive(self) -> bool:
        """Whether the score of a query in ``eval()`` depends on other queries, through norms."""
        return self.norm_statistics == "batch" and bool(tracking_norms(self))

    def explain(self) -> str:
        """Describe how this learner computes: the encoder call, and the backend of each op."""
        weight = next(self.encoder.parameters(), torch.empty(0))
        place = weight.device, weight.dtype
        backends = ", ".join(f"{op} {backend_of(op, *place)}" for op in self._ops)
        return (
            f"{type(self).__name__}, {self._description()}: one encoder call for the "
            f"examples of all tasks, then on {weight.device.type} "
            f"{str(weight.dtype).removeprefix('torch.')}: {backends}."
            f"{_TRANSDUCTIVE if self.is_transductive else ''}"
            f"{f' {self._engine.explain(self.encoder)}' if self._lowers() else ''}"
        )

    def _description(self) -> str:
        """The learner's options in words, for ``explain``."""
        raise NotImplementedError(f"{type(self).__name__} has no _description")

    def _adapted(self, support: Support) -> Adapted:
        """What the support costs, for any number of query batches."""
        raise NotImplementedError(f"{type(self).__name__} has no _adapted")

    def _score(
        self, adapted: Adapted, support: Support, queries: Queries, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the detached logits ``[T, Q, N]``, None unless ``return_logits``."""
        raise NotImplementedError(f"{type(self).__name__} has no _score")

    def _support(
        self,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        weight: Tensor | None,
        classes: Tensor | None,
    ) -> Support:
        present = classes_present(y, num_classes, weight)
        return Support(x, y, num_classes, weight, present, classes)

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
        return x.new_zeros(*present.shape, *self._row_shape(x)) + nothing

    def _row_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of an embedding, if no example ``[T, B, ...]`` is present to tell it."""
        return (1,)

    def _encode(self, x: Tensor) -> Tensor:
        """The encoder's output ``[B, ...]``; an error of it names the layer and what came."""
        if torch.compiler.is_compiling():
            embedding = self._run(self.encoder, x)
        else:
            try:
                embedding = (
                    self._engine(self.encoder, x) if self._lowers() else self._run(self.encoder, x)
                )
            except KINDS as error:
                raise described(error, self.encoder, "x", x) from error
        if not isinstance(embedding, Tensor) or embedding.shape[:1] != x.shape[:1]:
            got = getattr(embedding, "shape", None) or type(embedding).__name__
            raise ValueError(f"encoder: expected an output [{len(x)}, ...], got {got}")
        if torch.is_autocast_enabled(x.device.type):
            embedding = embedding.float()  # as autocast does for the losses of PyTorch
        return embedding

    def _lowers(self) -> bool:
        """Whether the encoder may run on fastmeta's own kernels."""
        return bool(self.lower) and self.norm_statistics == "running"

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        """``module(*inputs)``, its norms by the statistics that ``norm_statistics`` chooses."""
        if self.norm_statistics == "running":
            return module(*inputs)
        with self._statistics(module):
            return module(*inputs)

    def _statistics(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context in which norms in ``eval()`` follow ``norm_statistics``."""
        if self.norm_statistics == "running":
            return nullcontext()
        return without_running_statistics([m for m in tracking_norms(module) if not m.training])
