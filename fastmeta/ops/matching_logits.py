"""Class log-probabilities of matching networks."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.absence import without_absent
from fastmeta.core.autocast import without_autocast
from fastmeta.core.checks import check_choice, check_integer
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops import reference
from fastmeta.ops._checks import METRICS, check_labels, check_rows
from fastmeta.ops.matching_loss import check_scale
from fastmeta.ops.pairwise_distance import pairwise_distance


def matching_logits(
    query: Tensor,
    support: Tensor,
    support_labels: Tensor,
    num_classes: int,
    metric: str = "cosine",
    scale: float | Tensor = 10.0,
) -> Tensor:
    """Log of the probability that a softmax over all supports gives to each class.

        a[t, q, s] = -scale distance(query[t, q], support[t, s])
        logits[t, q, n] = logsumexp_{s of class n} a[t, q, s] - logsumexp_s a[t, q, s]

    ``matching_loss`` is minus these, at the query's label. They are log-probabilities: a softmax
    leaves them as they are. Composed of ``pairwise_distance``, which is native, and plain PyTorch;
    builds [T, Q, S]. Differentiable any number of times; works under torch.func and torch.compile.
    bfloat16 and float16 are computed in float32.

    Args:
        query: embeddings [T, Q, D], or [Q, D] for one task.
        support: [T, S, D], or [S, D], same dtype and device.
        support_labels: int64 [T, S], or [S], in [0, num_classes), or -1 for an absent support.
        num_classes: N, at least 0.
        metric: "cosine", "sqeuclidean", "euclidean" or "dot", see ``pairwise_distance``.
        scale: inverse temperature; a tensor without dimensions gets a gradient, see
            ``matching_loss``.

    Returns:
        [T, Q, N], or [Q, N], in the dtype of ``query``. A class without a support has minus
        infinity, and so have all classes of a task without one.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not agree, ``metric`` is unknown, ``num_classes`` is
            negative, or a label is neither in range nor -1 (the message names the first).

    Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016 (arXiv 1606.04080), equation 1.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> support, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> fm.matching_logits(support[2:], support, labels, 2, scale=1.0).exp()
        tensor([[0.4239, 0.5761]])
    """
    check_rows("query", query, "support", support, "[T, Q, D]", "[T, S, D]")
    check_labels("support_labels", support_labels, support.shape[:-1], query.device)
    check_integer("num_classes", num_classes, 0)
    check_choice("metric", metric, METRICS)
    if query.dim() == 2:
        query, support, support_labels = (x.unsqueeze(0) for x in (query, support, support_labels))
        return matching_logits(query, support, support_labels, num_classes, metric, scale)[0]
    dtype, wide = query.dtype, accumulation_dtype(query.dtype)
    if isinstance(scale, Tensor):
        check_scale(scale, metric, query.device)
        scale = scale.to(wide)
    reference.check_label_range(support_labels, num_classes, "support_labels")
    with without_autocast(query.device):
        support = without_absent(support.to(wide), support_labels)
        logits = -scale * pairwise_distance(query.to(wide), support, metric)
        logits = reference.class_log_probabilities(logits, support_labels, num_classes)
    return logits.to(dtype)
