"""Batch norm with a scale and a shift for each inner step (MAML++)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmeta.core.inner_step import current_step


class _PerStepBatchNorm(nn.Module):
    """Batch norm on batch statistics, with a row of weight and bias for each inner step."""

    _ndims: tuple[int, ...]  # of inputs

    def __init__(self, channels: int, steps: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 1 or steps < 0:
            raise ValueError(
                f"channels and steps: expected at least 1 and 0, got {channels} and {steps}"
            )
        self.channels, self.steps, self.eps = channels, steps, eps
        self.weight = nn.Parameter(torch.ones(steps + 1, channels))
        self.bias = nn.Parameter(torch.zeros(steps + 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self._ndims or x.shape[1] != self.channels:
            ndims = " or ".join(map(str, self._ndims))
            raise ValueError(
                f"x: expected {ndims} dimensions with {self.channels} channels in the second, "
                f"got shape {list(x.shape)}"
            )
        row = min(current_step(), self.steps)
        weight, bias = self.weight[row], self.bias[row]
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, steps={self.steps}, eps={self.eps}"


class PerStepBatchNorm2d(_PerStepBatchNorm):
    """Batch norm of images with a scale and a shift for each inner step (MAML++).

    Antoniou et al. 2019 (arXiv 1810.09502), "per-step batch normalization weights and biases".
    ``y = weight[k] (x - mean) / sqrt(var + eps) + bias[k]`` in passes at theta_k, the parameters
    after k inner steps. The support passes of K steps read rows 0 .. K-1, the query pass after them
    row K. A query loss at theta_k (``step_weights``) reads row k, and steps beyond ``steps`` read
    the last row. Mean and biased variance come from the batch, for each channel, in training and
    in evaluation; there are no running statistics.

    A ``MAML`` learner sets the step. ``MAML.hvp`` and calls outside a learner are at step 0, unless
    they are inside ``fastmeta.models.inner_step``. The inner loop adapts the rows like all other
    parameters, each by the passes that read it. In the paper only the outer optimizer changes them:
    use an inner step size of 0 for ``weight`` and ``bias`` (a dict or ``[L]`` as ``lr``).
    ``requires_grad=False`` freezes them.

    Args:
        channels: C of the inputs ``[B, C, H, W]``; weight and bias are ``[steps + 1, C]``, ones and
            zeros.
        steps: number K of inner steps with a row each.
        eps: added to the variance.

    Raises:
        ValueError: sizes out of range; inputs of another shape, or of one value a channel.

    Example:
        >>> import torch
        >>> from fastmeta.models import PerStepBatchNorm2d
        >>> norm = PerStepBatchNorm2d(4, steps=5)
        >>> norm(torch.randn(2, 4, 3, 3)).shape, norm.weight.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([6, 4]))
    """

    _ndims = (4,)


class PerStepBatchNorm1d(_PerStepBatchNorm):
    """``PerStepBatchNorm2d`` for features ``[B, C]`` and sequences ``[B, C, L]``."""

    _ndims = (2, 3)


def with_per_step_norms(model: nn.Module, steps: int) -> nn.Module:
    """A copy of a model whose batch norms have a scale and a shift for each inner step.

    Each row starts as the scale and the shift of the replaced norm; running statistics are dropped.

    Args:
        model: any module.
        steps: number of inner steps with a row each, see ``PerStepBatchNorm2d``.

    Raises:
        ValueError: ``model`` has no ``BatchNorm1d`` or ``BatchNorm2d``.

    Example:
        >>> from fastmeta.models import Conv4, with_per_step_norms
        >>> net = with_per_step_norms(Conv4(8), steps=5)
        >>> net.features[0][1]
        PerStepBatchNorm2d(8, steps=5, eps=1e-05)
    """
    replaced: dict[int, nn.Module] = {}
    for module in model.modules():
        kind = _PER_STEP.get(type(module))
        if kind is not None and isinstance(module, _BatchNorm):
            replaced[id(module)] = _with_rows(kind, module, steps)
    if not replaced:
        raise ValueError(f"model: {type(model).__name__} has no BatchNorm1d or BatchNorm2d")
    # deepcopy takes an object's copy from the memo, by its id: here the new norm of an old one.
    return copy.deepcopy(model, dict(replaced))


def _with_rows(kind: type[_PerStepBatchNorm], norm: _BatchNorm, steps: int) -> nn.Module:
    """A per-step norm whose rows are copies of the scale and the shift of ``norm``."""
    per_step = kind(norm.num_features, steps, norm.eps)
    if norm.affine:
        per_step.to(norm.weight.device, norm.weight.dtype)
        with torch.no_grad():
            per_step.weight.copy_(norm.weight)
            per_step.bias.copy_(norm.bias)
        per_step.weight.requires_grad_(norm.weight.requires_grad)
        per_step.bias.requires_grad_(norm.bias.requires_grad)
    return per_step


_PER_STEP: dict[type[nn.Module], type[_PerStepBatchNorm]] = {
    nn.BatchNorm1d: PerStepBatchNorm1d,
    nn.BatchNorm2d: PerStepBatchNorm2d,
}
