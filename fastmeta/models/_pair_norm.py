"""Batch norm of the sums of all pairs of feature maps, from the maps themselves.

A block of a relation network takes all pairs cat(a_q, b_n) of a task's maps through a convolution,
which is the sum of two, and then through a batch norm. Its statistics over the T Q N P numbers of a
channel need no pair. With u = E_q[a] and v = E_n[b], which are maps of a task, [T, C, P], means
over tasks t, pixels p and maps are

    mean     = E[u] + E[v]
    variance = E[(a - u)^2] + E[(b - v)^2] + E_tp[(u + v - mean)^2]

a sum of squares, in which nothing cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.core.autocast import without_autocast
from fastmeta.core.dtypes import accumulation_dtype

_ALL_BUT_CHANNELS = (0, 1, 3, 4)


def normalize_pairs(a: Tensor, b: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Halves whose sums over all pairs are ``norm`` of the sums of ``a`` and ``b``.

        normalized_a[t, q] + normalized_b[t, n] = norm(a[t, q] + b[t, n])

    as if the norm had got one batch of all T Q N sums: with their statistics while it trains, and
    then its running statistics are updated, else with its running statistics. Differentiable any
    number of times in a, b, and the norm's weight and bias. Half types and what autocast made of
    the maps are computed in the norm's float32.

    Args:
        a: maps [T, Q, C, H, W].
        b: maps [T, N, C, H, W].
        norm: of C channels.

    Returns:
        Two maps in the shapes and dtypes of a and b.

    Raises:
        ValueError: shapes do not agree, or the norm needs statistics of a single number, or none.

    Example:
        >>> import torch
        >>> from fastmeta.models._pair_norm import normalize_pairs
        >>> a, b = torch.randn(2, 7, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
        >>> x, y = normalize_pairs(a, b, torch.nn.BatchNorm2d(4))
        >>> pairs = x.unsqueeze(2) + y.unsqueeze(1)
        >>> pairs.mean((0, 1, 2, 4, 5)).abs().max() < 1e-5
        tensor(True)
    """
    _check(a, b, norm)
    with without_autocast(a.device):
        return _normalize(a, b, norm)


def _normalize(a: Tensor, b: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    x, y = (half.to(accumulation_dtype(half.dtype)) for half in (a, b))
    if norm.training or norm.running_mean is None or norm.running_var is None:
        u, v = (half.mean(1, keepdim=True) for half in (x, y))
        x, y = x - u, y - v
        mean_a, mean_b = (maps.mean(_ALL_BUT_CHANNELS, keepdim=True) for maps in (u, v))
        u, v = u - mean_a, v - mean_b
        # Of maps before pixels: a mean over all of them at once is ten times as slow.
        within = x.square().mean(1, keepdim=True) + y.square().mean(1, keepdim=True)
        variance = (within + (u + v).square()).mean(_ALL_BUT_CHANNELS, keepdim=True)
        if norm.training and norm.running_mean is not None:
            count = a.shape[1] * b[:, :, 0].numel()
            _update(norm, (mean_a + mean_b).flatten(), variance.flatten(), count)
    else:
        mean, variance = (z.view(-1, 1, 1) for z in (norm.running_mean, norm.running_var))
        x, u = x - mean, torch.zeros_like(mean)
        v = u
    # x + u and y + v are the halves less their means.
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.view(-1, 1, 1)
    shift = 0 if norm.bias is None else norm.bias.view(-1, 1, 1)
    x, y = torch.addcmul(u * scale, x, scale), torch.addcmul(v * scale + shift, y, scale)
    return x.to(a.dtype), y.to(b.dtype)


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as torch.nn.BatchNorm2d updates them from a batch of ``count``."""
    batches = norm.num_batches_tracked
    assert norm.running_mean is not None and norm.running_var is not None and batches is not None
    batches.add_(1)
    # Without a momentum: the mean of all batches.
    share = 1 / batches if norm.momentum is None else norm.momentum
    unbiased = variance * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_(share * (now.to(running.dtype) - running))


def _check(a: Tensor, b: Tensor, norm: nn.BatchNorm2d) -> None:
    for name, half in (("a", a), ("b", b)):
        if half.dim() != 5 or half.shape[2] != norm.num_features:
            raise ValueError(
                f"{name}: expected maps [T, Q, C, H, W] with {norm.num_features} channels like the "
                f"norm, got {list(half.shape)}"
            )
    if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise ValueError(
            "a [T, Q, C, H, W] and b [T, N, C, H, W]: expected the same T, C, H and W, got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    count = a.shape[1] * b[:, :, 0].numel()
    if count < 2 and (norm.training or norm.running_mean is None):
        raise ValueError(
            "a and b: expected more than one number a channel for the statistics of a batch, got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
