"""The loss of prototypical networks, fused with its gradient."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.core.absence import (
    ABSENT,
    may_have_absent,
    mean_factor,
    mean_over_present,
    without_absent,
)
from fastmeta.core.checks import check_choice
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_labels, check_mask, check_rows
from fastmeta.ops._pairwise_autograd import (
    PairwiseOp,
    PairwiseOptions,
    Rows,
    hessian_vector_product,
    pairwise,
    save,
    saved,
)
from fastmeta.ops._registration import as_function, contiguous_like, is_native, register
from fastmeta.ops.pairwise_distance import distance_tangent, pairwise_distance

REDUCTIONS = ("mean", "sum", "none")


def _loss_fake(query: Tensor, labels: Tensor) -> Tensor:
    return query.new_empty(labels.shape, dtype=accumulation_dtype(query.dtype))


register(
    "prototype_loss", lambda query, labels, prototypes, metric, scale: _loss_fake(query, labels)
)
register(
    "prototype_loss_backward",
    lambda weight, query, labels, prototypes, metric, scale: (
        _loss_fake(query, labels),
        contiguous_like(query),
        contiguous_like(prototypes),
    ),
)


def loss_tangent(
    query: Tensor,
    prototypes: Tensor,
    query_dot: Tensor,
    prototypes_dot: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> Tensor:
    """Derivative [T, Q] of each query's loss along the direction query_dot, prototypes_dot."""
    # In the dtype of the loss, which is float32 for half types.
    wide = accumulation_dtype(query.dtype)
    x, y, x_dot, y_dot = (z.to(wide) for z in (query, prototypes, query_dot, prototypes_dot))
    # Without a direction an absent query has no derivative, and neither has its derivative.
    x, x_dot = without_absent(x, labels), without_absent(x_dot, labels)
    probability = (-scale * reference.pairwise_distance(x, y, metric)).softmax(-1)
    distance_dot = distance_tangent(x, y, x_dot, y_dot, metric)
    at_label = reference.at_labels(distance_dot, labels)
    loss_dot = scale * (at_label - (probability * distance_dot).sum(2))
    return loss_dot.masked_fill(labels == ABSENT, 0) if may_have_absent(labels) else loss_dot


def _loss(
    query: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> Tensor:
    return torch.ops.fastmeta.prototype_loss(query, labels, prototypes, metric, scale)


def _gradient(
    weight: Tensor,
    query: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    metric: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-query loss, and the gradient of sum(weight * loss) to query and prototypes."""
    return torch.ops.fastmeta.prototype_loss_backward(
        weight, query, labels, prototypes, metric, scale
    )


def _backward(*args: Any) -> Rows:
    return _gradient(*args)[1:]


_LOSS = PairwiseOp(_loss, _backward, loss_tangent)


class WeightedLoss(Function):
    """Each task's loss [T], the weighted sum over queries, and in the same pass its gradient.

    The gradient is a second output, so that autograd can differentiate it: its cotangents arrive in
    ``backward``, which answers them with a Hessian-vector product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        metric: str,
        scale: float,
        weights: Tensor,
    ) -> tuple[Tensor, ...]:
        loss, *gradient = _gradient(weights, query, prototypes, labels, metric, scale)
        return (weights * loss).sum(1), *gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        # None for an output that nobody differentiates tells a first derivative from a second.
        ctx.set_materialize_grads(False)
        query, prototypes, labels, metric, scale, weights = inputs
        save(ctx, (query, prototypes, weights, *output[1:]), labels, metric, scale)

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *direction: Any) -> tuple[Any, ...]:
        (query, prototypes, weights, *gradient), options = saved(ctx)
        # Two terms: the cotangent of the loss, and the cotangents of the gradient itself.
        grads = [None, None] if grad_loss is None else _scaled(grad_loss, gradient)
        if any(d is not None for d in direction):
            second = _second(query, prototypes, direction, options, weights)
            grads = [b if a is None else a + b for a, b in zip(grads, second, strict=True)]
        return *grads, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, query_dot: Any, prototypes_dot: Any, *_: Any) -> tuple[Any, ...]:
        (query, prototypes, weights, *gradient), options = saved(ctx)
        direction = (query_dot, prototypes_dot)
        pairs = zip(gradient, direction, strict=True)
        along = [(g * d).sum((1, 2)) for g, d in pairs if d is not None]
        loss_dot = sum(along[1:], along[0]).to(accumulation_dtype(query.dtype))
        return loss_dot, *_second(query, prototypes, direction, options, weights)


class WeightedLossCompiled(WeightedLoss):
    """WeightedLoss for torch.compile, which has no second derivatives and refuses a ``jvp``."""

    jvp = Function.jvp  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        query, prototypes, labels, metric, scale, _weights = inputs
        save(ctx, (query, prototypes, *output[1:]), labels, metric, scale)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        (_query, _prototypes, *gradient), _options = saved(ctx)
        return *_times(grad_loss, gradient), None, None, None, None


def _times(grad_loss: Tensor, gradient: list[Tensor]) -> list[Tensor]:
    return [(grad_loss[:, None, None] * g).to(g.dtype) for g in gradient]


def _scaled(grad_loss: Tensor, gradient: list[Tensor]) -> list[Tensor]:
    """``gradient`` times the cotangent ``grad_loss`` [T]; on a CPU, a cotangent of 1 costs no pass.

    The tensors returned are then the saved ones. Autograd notices and reports a change in place.
    """
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(grad_loss)
    batched = batched or functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
    readable = grad_loss.device.type == "cpu" and not (batched or torch.is_grad_enabled())
    if readable and bool((grad_loss == 1).all()):
        return gradient
    return _times(grad_loss, gradient)


def _second(
    query: Tensor,
    prototypes: Tensor,
    direction: tuple[Any, ...],
    options: PairwiseOptions,
    weights: Tensor,
) -> tuple[Any, ...]:
    """Hessian-vector product of the weighted loss."""
    return hessian_vector_product(loss_tangent, weights, (query, prototypes), direction, options)


_loss_and_gradient = as_function(WeightedLoss, compiled=WeightedLossCompiled)


def _weighted_loss(*args: Any) -> Tensor:
    return cast("Tensor", _loss_and_gradient(*args)[0])


def prototype_loss(
    query: Tensor,
    query_labels: Tensor,
    prototypes: Tensor,
    metric: str = "sqeuclidean",
    scale: float = 1.0,
    reduction: str = "mean",
    present: Tensor | None = None,
) -> Tensor:
    """Cross entropy of queries against prototypes, logits = -scale * distance.

        loss[t, q] = logsumexp_n(-scale d(t, q, n)) + scale d(t, q, query_labels[t, q])

    Fused: the native kernels compute distances, softmax, loss and (for "mean" and "sum", if an
    input requires grad) the gradient in one pass over blocks of queries. No [Q, N] matrix exists;
    memory beyond inputs and outputs is O(N D). Second and higher derivatives are exact, and do
    build [T, Q, N]. Works under torch.func and torch.compile. bfloat16 and float16 are computed in
    float32. A NaN in a query makes that query's loss NaN.

    Args:
        query: embeddings [T, Q, D], or [Q, D] for one task.
        query_labels: int64 [T, Q], or [Q], in [0, N), or -1 for an absent query, whose loss and
            gradient are 0.
        prototypes: [T, N, D], or [N, D], same dtype and device; N at least 1.
        metric: "sqeuclidean", "euclidean", "cosine" or "dot", see ``pairwise_distance``.
        scale: inverse temperature of the softmax.
        reduction: "mean" over all queries of all tasks, "sum", or "none". With absent queries
            "mean" is that over tasks of each task's mean over its present queries, 0 without one.
        present: bool [T, N], or [N]: the classes that a task has. The others have logit minus
            infinity, whatever their prototypes are, and their prototypes get no gradient. The loss
            of a query with such a label is infinite. With ``present`` the loss is composed of
            ``pairwise_distance`` and a softmax, and builds [T, Q, N]. None: all of them.

    Returns:
        A scalar, or [T, Q] ([Q]) for "none", in the dtype of ``query``. Without queries "sum" is 0
        and "mean" is NaN, as in torch.nn.functional.cross_entropy.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not agree, there is no prototype, an option is unknown, or
            a label is neither in range nor -1 (the message names the first).

    Source: Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equation 2.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> query, label = torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1])
        >>> fm.prototype_loss(query, label, torch.tensor([[0.0], [2.0]]))
        tensor(0.0181)
    """
    check_rows("query", query, "prototypes", prototypes, "[T, Q, D]", "[T, N, D]")
    check_labels("query_labels", query_labels, query.shape[:-1], query.device)
    check_choice("metric", metric, METRICS)
    check_choice("reduction", reduction, REDUCTIONS)
    if prototypes.shape[-2] == 0:
        raise ValueError("prototypes: expected at least one class, got 0")
    if present is not None:
        check_mask("present", present, prototypes.shape[:-1], query.device)
    if query.dim() == 2:
        query, query_labels, prototypes = (
            x.unsqueeze(0) for x in (query, query_labels, prototypes)
        )
        present = None if present is None else present.unsqueeze(0)
        loss = prototype_loss(query, query_labels, prototypes, metric, scale, reduction, present)
        return loss.squeeze(0) if reduction == "none" else loss
    native = is_native("prototype_loss", query) and present is None
    requires_grad = query.requires_grad or prototypes.requires_grad
    if native and requires_grad and torch.is_grad_enabled() and reduction != "none":
        return _reduced_with_gradient(query, prototypes, query_labels, metric, scale, reduction)
    if present is not None:
        loss = _masked_loss(query, query_labels, prototypes, metric, scale, present)
    elif native:
        loss = pairwise(_LOSS, query, prototypes, query_labels, metric, float(scale))
    else:
        loss = reference.prototype_loss(query, query_labels, prototypes, metric, float(scale))
    if reduction == "mean":
        loss = mean_over_present(loss, query_labels)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.contiguous().to(query.dtype)


def _masked_loss(
    query: Tensor, labels: Tensor, prototypes: Tensor, metric: str, scale: float, present: Tensor
) -> Tensor:
    """Loss [T, Q] with logit minus infinity for the classes that a task lacks."""
    reference.check_label_range(labels, prototypes.shape[1], "query_labels")
    query = without_absent(query, labels)
    logits = masked_logits(-scale * pairwise_distance(query, prototypes, metric), present)
    # A task may have no class at all, and a softmax of nothing but minus infinities is NaN.
    logits = without_absent(logits, labels)
    return -reference.at_labels(logits.log_softmax(2), labels)


def masked_logits(logits: Tensor, present: Tensor | None) -> Tensor:
    """Logits [T, Q, N], minus infinity where ``present`` [T, N] is false."""
    return logits if present is None else logits.masked_fill(~present.unsqueeze(1), -math.inf)


def _reduced_with_gradient(
    query: Tensor, prototypes: Tensor, labels: Tensor, metric: str, scale: float, reduction: str
) -> Tensor:
    """The sum or the mean of the loss, from the kernel that computes the gradient as well."""
    count = labels.numel()
    # torch.compile knows no number of queries that may change, and divides afterwards.
    compiling = torch.compiler.is_compiling()
    weight = 1.0 if reduction == "sum" or compiling or count == 0 else 1 / count
    weights = torch.full_like(labels, weight, dtype=accumulation_dtype(query.dtype))
    if reduction == "mean" and may_have_absent(labels):
        weights = weights * mean_factor(labels, weights.dtype)
    total = _weighted_loss(query, prototypes, labels, metric, float(scale), weights).sum()
    divide = reduction == "mean" and (compiling or count == 0)
    return (total / count if divide else total).to(query.dtype)
