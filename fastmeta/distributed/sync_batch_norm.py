"""Batch norm over the batches of all ranks, also on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the examples of all ranks, on any device; ``nn.SyncBatchNorm`` needs CUDA.

    It has the parameters, buffers and options of ``nn.BatchNorm2d``. In ``eval()`` and in a single
    process it is an ordinary batch norm. In ``train()`` every rank must call it, and its gradient,
    equally often. It can be differentiated only once.

    Example:
        >>> import torch
        >>> from fastmeta.distributed import SyncBatchNorm
        >>> norm = SyncBatchNorm(4)
        >>> norm(torch.randn(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        self._check_input_dim(x)
        output, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, var * (count / (count - 1)))
        return output

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x: expected [B, {self.num_features}, ...], got shape {list(x.shape)}"
            )

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics."""
        seen, running_mean, running_var = map(
            self.get_buffer, ("num_batches_tracked", "running_mean", "running_var")
        )
        seen.add_(1)
        new = 1 / seen.item() if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), new)
        running_var.lerp_(var.to(running_var.dtype), new)


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with mean and var over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(x)
        scale = torch.rsqrt(var + eps)
        normal = (x - _wide(mean, x)) * _wide(scale, x)
        output = normal
        if weight is not None and bias is not None:
            output = normal * _wide(weight, x) + _wide(bias, x)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return output.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        normal = (x - _wide(mean, x)) * _wide(scale, x)
        grad = grad.to(normal.dtype)
        dims = _dims(x)
        sums = torch.stack([grad.sum(dims), (grad * normal).sum(dims)])
        means = sums.clone()
        dist.all_reduce(means)
        means /= count
        factor = scale if weight is None else scale * weight
        grad_x = (grad - _wide(means[0], x) - normal * _wide(means[1], x)) * _wide(factor, x)
        # Parameters get this rank's share: gradients are averaged over ranks afterwards.
        grad_bias, grad_weight = (None, None) if weight is None else sums
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values of each channel, over all ranks.

    The variances of the ranks are combined (Chan et al. 1983), which loses no digits if a mean is
    large.
    """
    dims = _dims(x)
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, dims, correction=0)
    count = mean.new_tensor([x.numel() // x.shape[1]])
    parts = [mean.new_empty(2 * len(mean) + 1) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.cat([mean, var, count]))
    means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _dims(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.ndim)]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    """``[C]`` in a shape that broadcasts over ``x``."""
    return channels.view(-1, *[1] * (x.ndim - 2))


def share_batch_statistics(module: nn.Module) -> nn.Module:
    """Make all batch norms of a module ``SyncBatchNorm``, in place.

    For learners whose norms see all tasks at once, such as ``ProtoNet``: on several ranks, they
    then compute the same as one process. MAML and its variants normalise each task by itself and do
    not need it.

    Args:
        module: any module; parameters and buffers stay the same tensors.

    Returns:
        The module; if it is a batch norm itself, its replacement.

    Example:
        >>> import fastmeta as fm
        >>> from fastmeta.distributed import share_batch_statistics
        >>> net = share_batch_statistics(fm.models.Conv4(8, ways=None))
        >>> isinstance(net.features[0][1], fm.distributed.SyncBatchNorm)
        True
    """
    if isinstance(module, _BatchNorm):
        shared = SyncBatchNorm.__new__(SyncBatchNorm)
        shared.__dict__ = module.__dict__.copy()
        return shared
    for name, child in module.named_children():
        setattr(module, name, share_batch_statistics(child))
    return module
