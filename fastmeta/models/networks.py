"""The networks that the few-shot literature measures on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmeta._inner_step import current_step, inner_step

__all__ = [
    "MLP",
    "Conv4",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "ResNet12",
    "inner_step",
    "with_per_step_norms",
]


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: MLP([1, 40, 40, 1]) is MAML's sinusoid network.

    Args:
        sizes: input, hidden and output widths; at least two, each at least 1.

    Inputs of more than two dimensions are flattened: [B, ...] -> [B, sizes[-1]].
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must hold at least two widths of at least 1, got {sizes}")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


def _block(inputs: int, hidden: int, pool: str) -> nn.Sequential:
    stride = 2 if pool == "stride" else 1
    layers = [
        nn.Conv2d(inputs, hidden, 3, stride=stride, padding=1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool == "max" else []))


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU, each halving the image; then linear.

    Vinyals et al. 2016 (arXiv 1606.04080), section 4.1.1; Finn et al. 2017 on Omniglot stride
    instead of pooling, which takes 3.7 times fewer operations.

    Args:
        hidden: channels of every block.
        ways: outputs [B, ways]; None leaves the linear layer out: embeddings [B, D].
        in_channels, image_size: the images are [B, in_channels, image_size, image_size].
        pool: "max" for 2x2 max pooling, "stride" for convolutions of stride 2 and a final spatial
            mean.

    Raises:
        ValueError: unknown `pool`, or an image too small to be halved four times.
    """

    def __init__(
        self,
        hidden: int = 64,
        ways: int | None = 5,
        in_channels: int = 1,
        image_size: int = 28,
        pool: str = "max",
    ) -> None:
        super().__init__()
        if pool not in ("max", "stride"):
            raise ValueError(f"pool must be 'max' or 'stride', got {pool!r}")
        if image_size < 16 and pool == "max":
            raise ValueError(f"image_size must be at least 16 with max pooling, got {image_size}")
        channels = [in_channels, *[hidden] * 4]
        blocks = [_block(i, o, pool) for i, o in itertools.pairwise(channels)]
        self.features = nn.Sequential(*blocks)
        self.mean = pool == "stride"
        self.embedding_size = hidden if self.mean else hidden * (image_size // 16) ** 2
        self.head = nn.Identity() if ways is None else nn.Linear(self.embedding_size, ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.features(x)
        embedding = features.mean((2, 3)) if self.mean else features.flatten(1)
        return self.head(embedding)


class _ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm beside one of 1x1, then 2x2 max pooling."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        channels = [inputs, width, width, width]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(channels):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), _leaky_relu()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.end = nn.Sequential(_leaky_relu(), nn.MaxPool2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.body(x) + self.shortcut(x))


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.1)


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, each halving the image; spatial mean; linear.

    Oreshkin et al. 2018 (TADAM, arXiv 1805.10123); with LeakyReLU of slope 0.1 as in Lee et al.
    2019 (MetaOptNet, arXiv 1904.03758), whose widths are (64, 160, 320, 640). Without DropBlock.

    Args:
        widths: channels of the four blocks.
        ways: outputs [B, ways]; None leaves the linear layer out: embeddings [B, widths[-1]].
        in_channels: the images are [B, in_channels, H, W], H and W at least 16.

    Raises:
        ValueError: not four widths of at least 1.

    Example:
        >>> net = ResNet12(widths=(4, 8, 8, 16), ways=5)
        >>> net(torch.randn(2, 3, 84, 84)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        ways: int | None = 5,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must hold four numbers of at least 1, got {widths}")
        channels = [in_channels, *widths]
        self.features = nn.Sequential(*map(_ResidualBlock, channels[:-1], channels[1:]))
        self.embedding_size = widths[-1]
        self.head = nn.Identity() if ways is None else nn.Linear(self.embedding_size, ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class _PerStepBatchNorm(nn.Module):
    """Batch norm on batch statistics, whose weight and bias are rows ``[steps + 1, C]``."""

    _ndims: tuple[int, ...]  # of inputs

    def __init__(self, channels: int, steps: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 1 or steps < 0:
            raise ValueError(
                f"channels must be at least 1 and steps at least 0, got {channels} and {steps}"
            )
        self.channels, self.steps, self.eps = channels, steps, eps
        self.weight = nn.Parameter(torch.ones(steps + 1, channels))
        self.bias = nn.Parameter(torch.zeros(steps + 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
    """Batch norm of images with a scale and a shift for each inner step, as MAML++ has it.

    Antoniou et al. 2019 (arXiv 1810.09502), "per-step batch normalization weights and biases".
    ``y = weight[k] (x - mean) / sqrt(var + eps) + bias[k]`` in passes at theta_k, the parameters
    after k inner steps: rows 0 .. K-1 belong to the support passes of K steps and row K to the
    query pass behind them; a query loss at theta_k (``step_weights``) takes row k. Steps beyond
    ``steps`` take the last row. Mean and biased variance are those of the batch, per channel, in
    training and evaluation alike; there are no running statistics.

    A ``MAML`` learner says which step it is at; ``MAML.hvp`` and calls outside a learner are at
    step 0, unless ``fastmeta.models.inner_step`` says otherwise. In the inner loop the rows are
    adapted like all other parameters, each by the passes that read it; an inner step size of 0 for
    ``weight`` and ``bias`` (a dict or ``[L]`` as ``lr``) leaves that to the outer optimizer, as in
    the paper, and ``requires_grad=False`` freezes them.

    Args:
        channels: C of the inputs ``[B, C, H, W]``; weight and bias are ``[steps + 1, C]``, ones and
            zeros.
        steps: inner steps K that have a row of their own.
        eps: added to the variance.

    Raises:
        ValueError: sizes out of range; inputs of another shape, or of one value a channel.

    Example:
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

    Each row starts as the scale and the shift of the norm that it replaces; running statistics are
    dropped.

    Args:
        model: any module.
        steps: inner steps that have a row of their own, see ``PerStepBatchNorm2d``.

    Raises:
        ValueError: ``model`` has no ``BatchNorm1d`` or ``BatchNorm2d``.

    Example:
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
    # What the copy takes for a module's copy is what the memo has under its id.
    return copy.deepcopy(model, dict(replaced))


def _with_rows(kind: type[_PerStepBatchNorm], norm: _BatchNorm, steps: int) -> nn.Module:
    rows = kind(norm.num_features, steps, norm.eps)
    if norm.affine:
        rows.to(norm.weight.device, norm.weight.dtype)
        with torch.no_grad():
            rows.weight.copy_(norm.weight)
            rows.bias.copy_(norm.bias)
        rows.weight.requires_grad_(norm.weight.requires_grad)
        rows.bias.requires_grad_(norm.bias.requires_grad)
    return rows


_PER_STEP: dict[type[nn.Module], type[_PerStepBatchNorm]] = {
    nn.BatchNorm1d: PerStepBatchNorm1d,
    nn.BatchNorm2d: PerStepBatchNorm2d,
}
