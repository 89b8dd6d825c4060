"""Pooled sums of all pairs of feature maps."""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.checks import check_integer
from fastmeta.ops import reference
from fastmeta.ops._checks import check_dims, check_floating, check_together

MOST = 15  # a place in a window of 15 x 15 is a byte, and one is left for "none"


def pair_pool(x: Tensor, y: Tensor, pool: int = 2) -> Tensor:
    """Maximum over windows of relu(x + y), for every map of ``x`` with every map of ``y``.

        out[q, n] = max_pool2d(relu(x[q] + y[n]), pool)

    The rest of a convolution block on cat(x, y), the first one of a relation network: the
    convolution of a concatenation is the sum of two, and a batch norm folds into both halves. So
    they need Q + N maps, and only this op sees all Q N pairs.

    As in PyTorch the first maximum of a window, row by row, takes its gradient, relu has the
    gradient 0 at 0, and rows and columns that fill no window are cut. Differentiable any number of
    times, forward and reverse; works under torch.func and torch.compile. bfloat16 and float16 are
    computed in float32.

    Args:
        x: maps [T, Q, C, H, W], or [Q, C, H, W] for one task.
        y: maps [T, N, C, H, W], or [N, C, H, W], same dtype and device.
        pool: height and width of a window and its step, from 1 to 15.

    Returns:
        [T, Q, N, C, H // pool, W // pool], or without T; contiguous. T, Q, N and C may be 0.

    Raises:
        TypeError: inputs are not floating-point tensors of one dtype; ``pool`` is no integer.
        ValueError: shapes do not agree, devices differ, ``pool`` is out of range, or a map is
            smaller than a window.

    Source: Sung et al. 2018 (arXiv 1711.06025).

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> x = torch.tensor([[[[1.0, 3.0], [2.0, 0.0]]]])
        >>> y = torch.tensor([[[[0.0, 0.0], [5.0, 0.0]]], [[[-4.0, -4.0], [-4.0, -4.0]]]])
        >>> fm.pair_pool(x, y).flatten()
        tensor([7., 0.])
    """
    _check(x, y, pool)
    if x.dim() == 4:
        return pair_pool(x.unsqueeze(0), y.unsqueeze(0), pool).squeeze(0)
    return reference.pair_pool(x, y, pool)


def _check(x: Tensor, y: Tensor, pool: int) -> None:
    for name, maps, shape in (("x", x, "[T, Q, C, H, W]"), ("y", y, "[T, N, C, H, W]")):
        check_floating(name, maps)
        check_dims(name, maps, shape)
    check_together("y", y, "x", x)
    if x.dim() != y.dim() or x.shape[:-4] != y.shape[:-4] or x.shape[-3:] != y.shape[-3:]:
        raise ValueError(
            "x [T, Q, C, H, W] and y [T, N, C, H, W]: expected the same T, C, H and W, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    check_integer("pool", pool, 1)
    if pool > MOST:
        raise ValueError(f"pool: expected at most {MOST}, got {pool}")
    if pool > min(x.shape[-2:]):
        raise ValueError(
            f"pool: expected at most the maps' height and width, got {pool} "
            f"for maps {list(x.shape[-2:])}"
        )
