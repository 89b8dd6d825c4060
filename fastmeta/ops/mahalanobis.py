"""Distances by a covariance of each class, and these covariances from a few examples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core.absence import is_readable, without_absent
from fastmeta.core.autocast import without_autocast
from fastmeta.core.checks import check_integer, check_number
from fastmeta.core.dtypes import accumulation_dtype
from fastmeta.ops._checks import check_dims, check_floating, check_labels, check_rows
from fastmeta.ops._rows_at import rows_at
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototypes import prototypes


def mahalanobis_distance(x: Tensor, y: Tensor, covariance: Tensor) -> Tensor:
    """Squared Mahalanobis distances of every row of ``x`` to every row of ``y``, for every task.

        d[t, q, n] = (x[t, q] - y[t, n])' inverse(covariance[t, n]) (x[t, q] - y[t, n])

    With identity matrices it is the squared Euclidean distance. Nothing is inverted: differences
    are whitened by the Cholesky factor of the covariance. One covariance a task whitens both sets
    of rows, and ``pairwise_distance`` does the rest. One a class takes memory O(T N D (Q + D)) and
    time O(T N D^2 (Q + D)).

    Differentiable any number of times in all three arguments; works under torch.func and
    torch.compile. bfloat16 and float16 are computed in float32.

    Args:
        x: [T, Q, D], or [Q, D] for one task.
        y: [T, N, D], or [N, D], same dtype and device.
        covariance: [T, N, D, D], one a class, or [T, D, D], one a task; without T for one task.
            Symmetric and positive definite: only its lower triangle is read. In the dtype of ``x``,
            or in float32 where ``x`` has a half type.

    Returns:
        [T, Q, N], or [Q, N].

    Raises:
        TypeError: inputs are not floating-point tensors of dtypes that fit.
        ValueError: shapes do not agree, devices differ, or a covariance is not positive definite
            (the message names the first). Where values cannot be read, as under vmap and
            torch.compile, its distances are NaN instead.

    Source: Bateni, Goyal, Masrani, Wood, Sigal 2020 (arXiv 1912.03432), equation 3.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x, y = torch.tensor([[2.0, 0.0]]), torch.zeros(2, 2)
        >>> fm.mahalanobis_distance(x, y, torch.stack([torch.eye(2), 4 * torch.eye(2)]))
        tensor([[4., 1.]])
    """
    check_rows("x", x, "y", y, "[T, Q, D]", "[T, N, D]")
    _check_covariance(covariance, x, y)
    if x.dim() == 2:
        batched = (z.unsqueeze(0) for z in (x, y, covariance))
        return mahalanobis_distance(*batched).squeeze(0)
    wide = accumulation_dtype(x.dtype)
    a, b, matrices = (z.to(wide) for z in (x, y, covariance))
    with without_autocast(x.device):
        factor = _cholesky(matrices)
        if covariance.dim() == 3:
            # A common offset changes no distance. Without it, whitened rows keep their digits.
            center = b.mean(1, keepdim=True) if b.shape[1] else 0
            white_a, white_b = (_whitened(factor, (z - center).mT).mT for z in (a, b))
            return pairwise_distance(white_a, white_b).to(x.dtype)
        differences = (a.unsqueeze(1) - b.unsqueeze(2)).mT  # [T, N, D, Q]
        return _whitened(factor, differences).square().sum(2).mT.to(x.dtype)


def _whitened(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, columns, upper=False)


def _check_covariance(covariance: Tensor, x: Tensor, y: Tensor) -> None:
    check_floating("covariance", covariance)
    if covariance.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        raise TypeError(f"covariance: expected dtype {x.dtype} like x, got {covariance.dtype}")
    if covariance.device != x.device:
        raise ValueError(f"covariance: expected device {x.device} like x, got {covariance.device}")
    tasks, (classes, features) = x.shape[:-2], y.shape[-2:]
    shapes = (*tasks, classes, features, features), (*tasks, features, features)
    if covariance.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"covariance: expected shape {expected}, got {list(covariance.shape)}")


def _cholesky(matrices: Tensor) -> Tensor:
    """Lower factors; ValueError, or NaN if values cannot be read, for one without a factor."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    failed = info != 0
    if is_readable(failed):
        bad = failed.nonzero()
        if len(bad):
            place = bad[0].tolist()
            raise ValueError(
                f"covariance{place}: expected a symmetric positive definite matrix, got one "
                "without a Cholesky factor"
            )
        return factor
    return factor.masked_fill(failed[..., None, None], torch.nan)


def class_covariances(
    x: Tensor, labels: Tensor, num_classes: int, ridge: float = 1.0, max_share: float = 1.0
) -> Tensor:
    """Covariance of every class, shrunk to the covariance of its task (Simple CNAPS).

        Q_n = l_n S_n + (1 - l_n) S + ridge I,    l_n = min(k_n / (k_n + 1), max_share)

    S_n is the covariance of the k_n examples of class n, S of all examples of the task, both with
    the divisor k - 1, and 0 for fewer than two examples. So a class of one example, or of none, has
    a covariance too. The defaults are the paper's. FS-Mol's molecules have ``ridge=0.1`` and
    ``max_share=0.1``.

    An example of label -1 is absent. Differentiable any number of times in ``x``; works under
    torch.func and torch.compile. Memory is O(T N D (S + D)).

    Args:
        x: support embeddings [T, S, D], or [S, D] for one task.
        labels: int64 [T, S], or [S], in [0, num_classes), or -1 for an absent example.
        num_classes: N, at least 0.
        ridge: at least 0. With 0 a covariance of fewer examples than features has no inverse.
        max_share: the largest l_n, from 0 to 1.

    Returns:
        [T, N, D, D], or [N, D, D], in the dtype of ``x``; float32 for bfloat16 and float16, whose
        rounding may leave no positive definite matrix.

    Raises:
        TypeError: ``x`` is not floating point, ``labels`` are not int64, an option is no number.
        ValueError: shapes or devices do not agree, an option is out of range, or a label is
            neither in range nor -1 (the message names the first).

    Source: Bateni, Goyal, Masrani, Wood, Sigal 2020 (arXiv 1912.03432), equations 4 and 5.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x = torch.tensor([[0.0], [2.0], [7.0]])
        >>> fm.class_covariances(x, torch.tensor([0, 0, 1]), 2).flatten()
        tensor([6.6667, 7.5000])
    """
    check_floating("x", x)
    check_dims("x", x, "[T, S, D]")
    check_labels("labels", labels, x.shape[:-1], x.device)
    check_integer("num_classes", num_classes, 0)
    check_number("ridge", ridge)
    if check_number("max_share", max_share) > 1:
        raise ValueError(f"max_share: expected at most 1, got {max_share}")
    if x.dim() == 2:
        one = class_covariances(x.unsqueeze(0), labels.unsqueeze(0), num_classes, ridge, max_share)
        return one.squeeze(0)
    with without_autocast(x.device):
        wide = without_absent(x.to(accumulation_dtype(x.dtype)), labels)
        of_class, counts = _scatter(wide, labels, num_classes)
        of_task, _ = _scatter(wide, labels.clamp(max=0), 1)
        share = (counts / (counts + 1)).clamp(max=max_share)[..., None, None]
        identity = torch.eye(x.shape[2], dtype=wide.dtype, device=x.device)
        return share * of_class + (1 - share) * of_task + ridge * identity


def _scatter(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Unbiased covariances [T, N, D, D] of the classes, and their numbers of examples [T, N]."""
    member = (labels.unsqueeze(1) == torch.arange(num_classes, device=x.device).unsqueeze(1)).to(
        x.dtype
    )
    counts = member.sum(2)
    means = prototypes(x, labels, num_classes)
    centred = without_absent(x - rows_at(means, labels), labels) if num_classes else x
    products = (member.unsqueeze(3) * centred.unsqueeze(1)).mT @ centred.unsqueeze(1)
    return products / (counts - 1).clamp(min=1)[..., None, None], counts
