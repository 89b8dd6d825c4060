"""What all heads share: how they are called, checked arguments, and the classes of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmeta.core.absence import ABSENT, may_have_absent, without_absent
from fastmeta.core.autocast import without_autocast
from fastmeta.core.checks import check_integer
from fastmeta.core.classes import classes_present, count_classes
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._checks import check_floating, check_labels, check_mask, check_rows
from fastmeta.ops.reference import check_label_range, safe_sqrt

_EPS = 1e-12  # the least length by which features are divided


@dataclass(frozen=True)
class Tasks:
    """Checked arguments of a head, in the dtype in which it computes.

    Attributes:
        support, query: ``[T, S, D]`` and ``[T, Q, D]``; rows of absent examples are 0.
        labels: ``[T, S]``, in ``[0, N)``, or -1 for an absent example.
        num_classes: N.
        classes: bool ``[T, N]``, the classes that compete: those with a support example, or all in
            a task that has none. None: all in every task.
        queries: bool ``[T, Q]``, the queries that exist. None: all of them.
        is_unit: whether all features have length 1.
    """

    support: Tensor
    labels: Tensor
    query: Tensor
    num_classes: int
    classes: Tensor | None
    queries: Tensor | None
    is_unit: bool = False

    @property
    def member(self) -> Tensor:
        """Classes of the support ``[T, N, S]``: 1 at its label, 0 elsewhere and if absent."""
        classes = torch.arange(self.num_classes, device=self.labels.device)
        return (self.labels.unsqueeze(1) == classes.unsqueeze(1)).to(self.support.dtype)

    @property
    def rows(self) -> Tensor:
        """Support, then queries ``[T, S + Q, D]``."""
        return torch.cat([self.support, self.query], 1)

    def competing(self, scores: Tensor) -> Tensor:
        """``scores`` ``[T, N, B]``, minus infinity at classes that do not compete."""
        if self.classes is None:
            return scores
        return scores.masked_fill(~self.classes.unsqueeze(-1), -torch.inf)

    @property
    def origin(self) -> Tensor | None:
        """A point ``[T, 1, D]`` amid the queries, from which distances keep their digits.

        None: the origin is one, as features have length 1.
        """
        return None if self.is_unit else self.query.mean(1, keepdim=True)

    def share_of_queries(self) -> Tensor:
        """Weights ``[T, 1, Q]`` of a mean over the queries that exist."""
        count = self.query.shape[1]
        if self.queries is None:
            return self.query.new_full((1, 1, 1), 1 / max(count, 1)).expand(1, 1, count)
        present = self.queries.to(self.query.dtype).unsqueeze(1)
        return present / present.sum(-1, keepdim=True).clamp(min=1)

    def share_of_support(self) -> Tensor:
        """Weights ``[T, 1, S]`` of a mean over the present support examples."""
        present = (self.labels != ABSENT).to(self.support.dtype).unsqueeze(1)
        return present / present.sum(-1, keepdim=True).clamp(min=1)


class Head(nn.Module, ABC):
    """A classifier of stored features: ``head(support, support_labels, query) -> logits``.

    The softmax of the logits is what the method says of a query's class. All tasks are computed at
    once. A support example of label -1 is absent, and a class without a support example has logit
    minus infinity in its task. bfloat16 and float16 are computed in float32.

    Args:
        normalize: divide the features of each example by their length.
        center: features ``[D]`` that are subtracted first, such as their mean over the classes on
            which the network was trained. None: nothing is subtracted.

    Attributes:
        transductive: whether the logits of a query depend on the other queries. Such accuracies
            do not compare with an inductive method's.
    """

    transductive: ClassVar[bool] = False
    center: Tensor | None

    def __init__(self, *, normalize: bool = False, center: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
        if center is not None:
            check_floating("center", center)
            if center.dim() != 1:
                raise ValueError(f"center: expected shape [D], got {list(center.shape)}")
        self.normalize = normalize
        self.register_buffer("center", center)

    def __call__(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int | None = None,
        query_present: Tensor | None = None,
    ) -> Tensor:
        """Logits of the queries of every task.

        Args:
            support: features ``[T, S, D]``, or ``[S, D]`` for one task.
            support_labels: int64 ``[T, S]``, or ``[S]``, in ``[0, N)``; -1: an absent example.
            query: ``[T, Q, D]``, or ``[Q, D]``, same dtype and device.
            num_classes: N; None: the largest label + 1, and no label below it may be missing.
            query_present: bool ``[T, Q]``, or ``[Q]``: the queries that exist, for padded tasks; a
                transductive head learns from no others. Their logits have no meaning. None: all.

        Returns:
            ``[T, Q, N]``, or ``[Q, N]``, in the dtype of the features.

        Raises:
            TypeError: features are not floating point, or labels not int64.
            ValueError: shapes, devices or labels do not fit together.
        """
        logits: Tensor = super().__call__(
            support, support_labels, query, num_classes, query_present
        )
        return logits

    def forward(
        self,
        support: Tensor,
        support_labels: Tensor,
        query: Tensor,
        num_classes: int | None = None,
        query_present: Tensor | None = None,
    ) -> Tensor:
        """Same as a call."""
        _check(support, support_labels, query, query_present)
        if support.dim() == 2:
            present = None if query_present is None else query_present.unsqueeze(0)
            support, labels, query = (x.unsqueeze(0) for x in (support, support_labels, query))
            return self.forward(support, labels, query, num_classes, present).squeeze(0)
        ways = _ways(support_labels, num_classes)
        present = classes_present(support_labels, ways)
        with without_autocast(support.device):
            tasks = self._tasks(support, support_labels, query, ways, present, query_present)
            logits = self._logits(tasks)
        if present is not None:
            logits = logits.masked_fill(~present.unsqueeze(1), -torch.inf)
        return logits.to(support.dtype)

    @abstractmethod
    def _logits(self, tasks: Tasks) -> Tensor:
        """Logits ``[T, Q, N]``; classes without a support example may have any."""

    def _prepared(self, x: Tensor) -> Tensor:
        """The caller's features as the method takes them."""
        if self.center is not None:
            if self.center.shape != x.shape[-1:]:
                raise ValueError(
                    f"center: expected shape {[x.shape[-1]]}, got {list(self.center.shape)}"
                )
            x = x - self.center.to(x)
        return unit(x) if self.normalize else x

    def _tasks(
        self,
        support: Tensor,
        labels: Tensor,
        query: Tensor,
        ways: int,
        present: Tensor | None,
        queries: Tensor | None,
    ) -> Tasks:
        wide = accumulation_dtype(support.dtype)
        support, query = support.to(wide), query.to(wide)
        # Padding is filled twice: it may hold NaN, and a center would move its zeros.
        if may_have_absent(labels):
            support = without_absent(self._prepared(without_absent(support, labels)), labels)
        else:
            support = self._prepared(support)
        if queries is None:
            query = self._prepared(query)
        else:
            absent = ~queries.unsqueeze(-1)
            query = self._prepared(query.masked_fill(absent, 0)).masked_fill(absent, 0)
        classes = None if present is None else present | ~present.any(1, keepdim=True)
        return Tasks(support, labels, query, ways, classes, queries, self.normalize)

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if name[0] != "_"}
        options.pop("training")
        shown = [f"{name}={value!r}" for name, value in options.items()]
        return ", ".join([*shown, *(["center"] if self.center is not None else [])])


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays. Differentiable any number of times, also there."""
    return x / lengths(x).clamp(min=_EPS)


def lengths(x: Tensor) -> Tensor:
    """Euclidean lengths ``[..., 1]`` of the rows."""
    if x.requires_grad:  # the norm of PyTorch has no second derivative at 0
        return safe_sqrt(x.square().sum(-1, keepdim=True))
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _check(support: Tensor, labels: Tensor, query: Tensor, present: Tensor | None) -> None:
    check_rows("support", support, "query", query, "[T, S, D]", "[T, Q, D]")
    check_labels("support_labels", labels, support.shape[:-1], support.device)
    if present is not None:
        check_mask("query_present", present, query.shape[:-1], query.device)


def _ways(labels: Tensor, num_classes: int | None) -> int:
    if num_classes is None:
        num_classes = count_classes(labels, "support_labels", "")
    else:
        check_integer("num_classes", num_classes, 1)
    check_label_range(labels, num_classes, "support_labels")
    return num_classes
