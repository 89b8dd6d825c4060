"""Every op in plain PyTorch: the fallback without a native kernel, and the tests' oracle.

All tensors lead with tasks, and arguments have been checked. bfloat16 and float16 are computed in
float32. Each function is differentiable any number of times, and works under torch.func and
torch.compile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.core.absence import (
    ABSENT,
    is_readable,
    may_have_absent,
    mean_factor,
    without_absent,
)
from fastmeta.core.autocast import without_autocast
from fastmeta.core.dtypes import accumulation_dtype

Op = TypeVar("Op", bound=Callable[..., Any])

COSINE_EPS = 1e-8

_DIRECT_LIMIT = 1 << 22  # differences [T, Q, N, D] held at once, in elements


def _in_own_dtype(op: Op) -> Op:
    """``op`` without autocast: it computes in the dtype of its arguments, like a compiled op."""

    @functools.wraps(op)
    def call(x: Tensor, *args: Any) -> Any:
        with without_autocast(x.device):
            return op(x, *args)

    return cast("Op", call)


def inner_update(params: Tensor, grads: Tensor, lr: Tensor) -> Tensor:
    """params - lr * grads for [T, P] params and grads, lr broadcastable to [T, P]."""
    out = params.to(lr.dtype) - lr * grads.to(lr.dtype)
    return out.to(params.dtype)


def check_label_range(labels: Tensor, classes: int | None, name: str) -> None:
    """Raise ValueError for the first label that is neither in [0, classes) nor ABSENT.

    Without ``classes`` a label may be any number of at least 0. Labels whose values cannot be read
    (fake, traced, vmapped, or of a CUDA stream that is being captured) are not checked.
    """
    if not is_readable(labels):
        return
    past = 0 if classes is None else labels >= classes
    bounds = "label >= 0" if classes is None else f"0 <= label < {classes}"
    wanted = f"{bounds} or {ABSENT} for an absent example"
    _check_every_label((labels < ABSENT) | past, labels, name, wanted)


def _check_every_label(bad: Tensor, labels: Tensor, name: str, wanted: str) -> None:
    """Raise ValueError for the first of ``labels`` that is ``bad``."""
    found = bad.nonzero()
    if len(found):
        first = found[0].tolist()
        raise ValueError(f"{name}{first} is {int(labels[tuple(first)])}, expected {wanted}")


@_in_own_dtype
def prototypes(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class means [T, N, D] of x [T, S, D]; a class without an example has mean zero."""
    check_label_range(labels, num_classes, "labels")
    wide = without_absent(x.to(accumulation_dtype(x.dtype)), labels)
    member = (labels.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).to(wide.dtype)
    counts = member.sum(1).clamp(min=1)
    return ((member.mT @ wide) / counts.unsqueeze(-1)).to(x.dtype)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] * x.shape[1] * y.shape[1] * x.shape[2] <= _DIRECT_LIMIT:
        return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    # The expansion loses digits of points that are close to each other: float64 has them to spare.
    wide = x.dtype if x.device.type == "mps" else torch.float64  # mps has no float64
    a, b = x.to(wide), y.to(wide)
    center = b.mean(1, keepdim=True)
    a, b = a - center, b - center
    norms = a.square().sum(-1).unsqueeze(2) + b.square().sum(-1).unsqueeze(1)
    return (norms - 2 * a @ b.mT).clamp(min=0).to(x.dtype)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivatives at 0 are 0 instead of infinite."""
    zero = x == 0
    # A mask after the root would not do: 0 times its infinite derivative is NaN.
    return torch.where(zero, 1.0, x).sqrt().masked_fill(zero, 0.0)


def normalized(x: Tensor) -> Tensor:
    """Rows of length 1; a row shorter than COSINE_EPS is divided by that instead."""
    return x / safe_sqrt(x.square().sum(-1, keepdim=True)).clamp(min=COSINE_EPS)


@_in_own_dtype
def pairwise_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Distances [T, Q, N] between the rows of x [T, Q, D] and y [T, N, D]."""
    a, b = (z.to(accumulation_dtype(x.dtype)) for z in (x, y))
    if metric == "sqeuclidean":
        out = _squared_distance(a, b)
    elif metric == "euclidean":
        out = safe_sqrt(_squared_distance(a, b))
    elif metric == "cosine":
        out = 1 - normalized(a) @ normalized(b).mT
    else:
        out = -(a @ b.mT)
    return out.to(x.dtype)


def _pair_distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Distances of pairs of rows, from sums of differences or products."""
    if metric == "cosine":
        return 1 - (normalized(a) * normalized(b)).sum(-1)
    if metric == "dot":
        return -(a * b).sum(-1)
    squared = (a - b).square().sum(-1)
    return safe_sqrt(squared) if metric == "euclidean" else squared


@_in_own_dtype
def nearest(
    x: Tensor, y: Tensor, present: Tensor | None, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Distances and indices [T, Q, k] of the k nearest rows of y [T, N, D] to each row of x."""
    a, b = (z.to(accumulation_dtype(x.dtype)) for z in (x, y))
    # A stable sort: equal distances stay in order, and NaN comes last.
    order = pairwise_distance(a.detach(), b.detach(), metric).sort(dim=2, stable=True).indices
    if present is not None:
        absent = ~present.unsqueeze(1).expand(-1, x.shape[1], -1).gather(2, order)
        order = order.gather(2, absent.to(torch.uint8).sort(dim=2, stable=True).indices)
    chosen = order[..., :k]
    rows = b.gather(1, chosen.flatten(1).unsqueeze(2).expand(-1, -1, b.shape[2]))
    rows = rows.unflatten(1, chosen.shape[1:])
    if present is not None:
        missing = ~present.unsqueeze(1).expand(-1, x.shape[1], -1).gather(2, chosen)
        rows = rows.masked_fill(missing.unsqueeze(3), 0)
    distances = _pair_distance(a.unsqueeze(2), rows, metric)
    if present is not None:
        distances = distances.masked_fill(missing, math.inf)
        chosen = chosen.masked_fill(missing, ABSENT)
    return distances.to(x.dtype), chosen


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """values [T, Q, N] at labels [T, Q], and 0 for an absent one.

    It is NaN, with a NaN gradient, for a label out of range.
    """
    known, absent = (labels >= 0) & (labels < values.shape[2]), labels == ABSENT
    # Labels may be unchecked here, and a gather out of range would end the CUDA context.
    gathered = values.gather(2, labels.where(known, 0).unsqueeze(2)).squeeze(2)
    factor = torch.where(known | absent, 1.0, math.nan).to(values.dtype)
    return (gathered * factor).masked_fill(absent, 0)


@_in_own_dtype
def prototype_loss(
    query: Tensor, labels: Tensor, prototypes: Tensor, metric: str, scale: float
) -> Tensor:
    """Loss [T, Q] of each query: cross entropy of logits -scale * distance."""
    check_label_range(labels, prototypes.shape[1], "query_labels")
    a, b = (z.to(accumulation_dtype(query.dtype)) for z in (query, prototypes))
    a = without_absent(a, labels)
    logits = -scale * pairwise_distance(a, b, metric)
    return -at_labels(logits.log_softmax(2), labels)


class Matches(NamedTuple):
    """Which supports a query is compared with, bool [T, Q, S].

    Attributes:
        any: the present ones.
        same: the ones of the query's class.
        factor: 1, or NaN for a label below ABSENT, which could not be read before; [T, Q].
    """

    any: Tensor
    same: Tensor
    factor: Tensor


def matches(query_labels: Tensor, support_labels: Tensor, exclude_self: bool) -> Matches:
    """The supports of each query; with ``exclude_self`` support q is none of query q's."""
    of_query, of_support = query_labels.unsqueeze(2), support_labels.unsqueeze(1)
    present = (of_support != ABSENT).expand(-1, query_labels.shape[1], -1)
    if exclude_self:
        itself = torch.eye(query_labels.shape[1], dtype=torch.bool, device=query_labels.device)
        present = present & ~itself
    invalid = (query_labels < ABSENT) | (support_labels < ABSENT).any(1, keepdim=True)
    factor = torch.where(invalid, math.nan, 1.0)
    return Matches(present, present & (of_query == of_support), factor)


def check_matching_labels(query_labels: Tensor, support_labels: Tensor, exclude_self: bool) -> None:
    """Raise ValueError for the first label below ABSENT, or query without support of its class.

    Labels whose values cannot be read are not checked.
    """
    check_label_range(query_labels, None, "query_labels")
    check_label_range(support_labels, None, "support_labels")
    if not (is_readable(query_labels) and is_readable(support_labels)):
        return
    same = matches(query_labels, support_labels, exclude_self).same
    other = " other than the query itself" if exclude_self else ""
    wanted = f"a class with a support example{other} in this task, or {ABSENT}"
    lonely = ~same.any(2) & (query_labels != ABSENT)
    _check_every_label(lonely, query_labels, "query_labels", wanted)


def logsumexp_where(logits: Tensor, mask: Tensor, of_none: float) -> Tensor:
    """logsumexp over the last dimension where ``mask``, and the constant ``of_none`` for none."""
    some = mask.any(-1)
    # Rows without any keep their logits: minus infinity in all of them would make the gradient NaN.
    kept = logits.masked_fill(~mask & some.unsqueeze(-1), -math.inf)
    if logits.shape[-1] == 0:
        return kept.sum(-1).masked_fill(~some, of_none)
    return kept.logsumexp(-1).masked_fill(~some, of_none)


def softmax_where(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where ``mask``, and 0 elsewhere."""
    some = mask.any(-1, keepdim=True)
    return logits.masked_fill(~mask & some, -math.inf).softmax(-1).masked_fill(~mask, 0)


@_in_own_dtype
def matching_loss(
    query: Tensor,
    query_labels: Tensor,
    support: Tensor,
    support_labels: Tensor,
    metric: str,
    scale: float,
    exclude_self: bool,
) -> Tensor:
    """Loss [T, Q] of each query: minus the log-probability that softmax gives to its class."""
    check_matching_labels(query_labels, support_labels, exclude_self)
    a, b = (z.to(accumulation_dtype(query.dtype)) for z in (query, support))
    a, b = without_absent(a, query_labels), without_absent(b, support_labels)
    logits = -scale * pairwise_distance(a, b, metric)
    found = matches(query_labels, support_labels, exclude_self)
    loss = logsumexp_where(logits, found.any, 0) - logsumexp_where(logits, found.same, -math.inf)
    return (loss * found.factor.to(loss.dtype)).masked_fill(query_labels == ABSENT, 0)


def class_log_probabilities(logits: Tensor, support_labels: Tensor, num_classes: int) -> Tensor:
    """Log-probability [T, Q, N] of each class, from logits [T, Q, S] of the supports.

    It is minus infinity for a class without a support, and NaN in a task with a label out of range.
    """
    known = (support_labels >= 0) & (support_labels < num_classes)
    invalid = ~known & (support_labels != ABSENT)
    # Absent supports make up one more class, which is dropped at the end.
    index = support_labels.where(known, num_classes).unsqueeze(1).expand(logits.shape)
    logits = logits.masked_fill(~known.unsqueeze(1), 0)
    lowest = torch.finfo(logits.dtype).min
    start = logits.new_full((*logits.shape[:2], num_classes + 1), lowest)
    largest = start.scatter_reduce(2, index, logits.detach(), "amax").detach()
    sums = torch.zeros_like(start).scatter_add(2, index, (logits - largest.gather(2, index)).exp())
    largest, sums = largest[..., :num_classes], sums[..., :num_classes]
    empty = sums == 0
    each = sums.masked_fill(empty, 1).log() + largest.masked_fill(empty, 0)
    total = logsumexp_where(each, ~empty, 0).unsqueeze(2)
    factor = torch.where(invalid.any(1), math.nan, 1.0).to(logits.dtype)
    return ((each - total) * factor[:, None, None]).masked_fill(empty, -math.inf)


def head_residual(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Gradient of each task's mean loss to its outputs [T, S, N]."""
    examples, ways = outputs.shape[1:]
    if loss == "mse":
        return 2 / (examples * ways) * (outputs - targets.to(outputs.dtype))
    if loss == "logistic":
        return mean_of_labelled(outputs.sigmoid() - targets.unsqueeze(2), targets)
    one_hot = targets.unsqueeze(2) == torch.arange(ways, device=targets.device)
    return mean_of_labelled(outputs.softmax(2) - one_hot.to(outputs.dtype), targets)


def mean_of_labelled(values: Tensor, labels: Tensor) -> Tensor:
    """values [T, S, N] over each task's number of present examples, and 0 for the absent ones."""
    if may_have_absent(labels):
        values = values.masked_fill((labels == ABSENT).unsqueeze(2), 0)
        values = values * mean_factor(labels, values.dtype).unsqueeze(2)
    return values / values.shape[1]


@_in_own_dtype
def linear_head(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Tensor,
    loss: str,
    weight_decay: float,
    first_order: bool,
) -> tuple[Tensor, Tensor | None]:
    """Heads weight [T, N, D], bias [T, N] or None, after a step for each column of lr [T, K]."""
    if loss != "mse":
        check_label_range(targets, 2 if loss == "logistic" else weight.shape[1], "targets")
    features, w = x.to(lr.dtype), weight.to(lr.dtype, copy=True)
    if loss != "mse":
        features = without_absent(features, targets)
    b = None if bias is None else bias.to(lr.dtype, copy=True)
    for step_size in lr.T:
        outputs = features @ w.mT if b is None else features @ w.mT + b.unsqueeze(1)
        residual = head_residual(outputs, targets, loss)
        gradient, bias_gradient = residual.mT @ features, residual.sum(1)
        if first_order:
            gradient, bias_gradient = gradient.detach(), bias_gradient.detach()
        w = w - step_size[:, None, None] * (gradient + weight_decay * w)
        b = None if b is None else b - step_size[:, None] * (bias_gradient + weight_decay * b)
    return w.to(weight.dtype), None if bias is None or b is None else b.to(bias.dtype)


def conv_out_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of a convolution's outputs; below 1 if the kernel is too large."""
    windows = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows]


@_in_own_dtype
def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Each task's convolution [T, B, O, H', W'], as one convolution whose groups are the tasks.

    The result is channels-last in memory if x is, like the compiled op's.
    """
    tasks, examples = x.shape[:2]
    wide = accumulation_dtype(x.dtype)
    if tasks == 0 or examples == 0:
        sizes = conv_out_size(x.shape[3:], weight.shape[3:], stride, padding, dilation)
        # conv2d takes no empty batch. The sum of zeros joins the inputs to autograd.
        zero = 0 * sum(tensor.sum() for tensor in (x, weight, bias) if tensor is not None)
        out = x.new_zeros(tasks, examples, weight.shape[1], *sizes) + zero
    else:
        images = x.to(wide).transpose(0, 1).flatten(1, 2)
        biases = None if bias is None else bias.to(wide).flatten()
        out = F.conv2d(
            images,
            weight.to(wide).flatten(0, 1),
            biases,
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            groups=tasks * groups,
        )
        out = out.unflatten(1, (tasks, weight.shape[1])).transpose(0, 1).to(x.dtype)
    if is_channels_last(x):
        return as_channels_last(out)
    return out.clone(memory_format=torch.contiguous_format)


def is_channels_last(x: Tensor) -> bool:
    """Whether images [T, B, C, H, W] are channels-last in memory, and not contiguous too."""
    by_channels = x.shape[2] > 1 and x.stride(2) == 1 and x.stride(4) == x.shape[2]
    return by_channels and not x.is_contiguous()


def as_channels_last(x: Tensor) -> Tensor:
    """A channels-last copy of the images [T, B, C, H, W]."""
    copy = x.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)
    return copy.permute(0, 1, 4, 2, 3)


def task_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, B, C, ...] normalised by each task's channels, with weight and bias [T, C]."""
    wide, dims = x.to(accumulation_dtype(x.dtype)), (1, *range(3, x.dim()))
    shape = (*weight.shape[:1], 1, *weight.shape[1:], *(1 for _ in dims[1:]))
    centred = wide - wide.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    y = weight.view(shape) * (centred * (variance + eps).rsqrt()) + bias.view(shape)
    return y.to(x.dtype)


_PAIR_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "abs": torch.abs,
}


@_in_own_dtype
def pair_scores(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Scores [T, Q, N]: bias [T] + sum_h weight [T, H] activation(x [T, Q, H] + y [T, N, H])."""
    a, b, w, c = (z.to(accumulation_dtype(x.dtype)) for z in (x, y, weight, bias))
    hidden = _PAIR_ACTIVATIONS[activation](a.unsqueeze(2) + b.unsqueeze(1))
    scores = (hidden.flatten(1, 2) @ w.unsqueeze(2)).view(hidden.shape[:3])
    return (scores + c[:, None, None]).to(x.dtype)


@_in_own_dtype
def pair_pool(x: Tensor, y: Tensor, pool: int) -> Tensor:
    """max_pool(relu(x + y)) [T, Q, N, C, H', W'] of all pairs of maps, windows of pool x pool."""
    a, b = (z.to(accumulation_dtype(x.dtype)) for z in (x, y))
    height, width = (size // pool for size in x.shape[3:])
    pairs = a.unsqueeze(2) + b.unsqueeze(1)
    windows = pairs[..., : height * pool, : width * pool]
    windows = windows.unflatten(5, (width, pool)).unflatten(4, (height, pool))
    windows = windows.transpose(5, 6).flatten(6)
    # The first of equal ones, as in max_pool2d; amax would share the gradient among them.
    largest = windows.detach().argmax(6, keepdim=True)
    return windows.gather(6, largest).squeeze(6).relu().to(x.dtype)
