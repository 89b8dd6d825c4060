"""Standard networks of the few-shot literature."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from fastmeta.core.checks import check_choice

__all__ = [
    "MLP",
    "Conv4",
    "ResNet12",
]


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; ``MLP([1, 40, 40, 1])`` is MAML's sinusoid network.

    Args:
        sizes: input, hidden and output widths; at least two, each at least 1.

    Inputs of more than two dimensions are flattened: [B, ...] -> [B, sizes[-1]].
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: expected at least two widths of at least 1, got {sizes}")
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

    Vinyals et al. 2016 (arXiv 1606.04080), section 4.1.1. On Omniglot, Finn et al. 2017 use strides
    instead of pooling, which takes 3.7 times fewer operations.

    Args:
        hidden: channels of every block.
        ways: outputs [B, ways]; None leaves out the linear layer and gives embeddings [B, D].
        in_channels, image_size: the images are [B, in_channels, image_size, image_size].
        pool: "max" for 2x2 max pooling, "stride" for convolutions of stride 2 and a final spatial
            mean.

    Raises:
        ValueError: unknown ``pool``, or an image too small to be halved four times.
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
        check_choice("pool", pool, ("max", "stride"))
        if image_size < 16 and pool == "max":
            raise ValueError(f"image_size: expected at least 16 with max pooling, got {image_size}")
        channels = [in_channels, *[hidden] * 4]
        blocks = [_block(i, o, pool) for i, o in itertools.pairwise(channels)]
        self.features = nn.Sequential(*blocks)
        self.mean = pool == "stride"
        self.embedding_size = hidden if self.mean else hidden * (image_size // 16) ** 2
        self.head = nn.Identity() if ways is None else nn.Linear(self.embedding_size, ways)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        embedding = features.mean((2, 3)) if self.mean else features.flatten(1)
        return self.head(embedding)


class _ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, a 1x1 shortcut, then 2x2 max pooling."""

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

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x) + self.shortcut(x))


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.1)


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, each halving the image; spatial mean; linear.

    Oreshkin et al. 2018 (TADAM, arXiv 1805.10123), with LeakyReLU of slope 0.1 as in Lee et al.
    2019 (MetaOptNet, arXiv 1904.03758), who use widths (64, 160, 320, 640). Without DropBlock.

    Args:
        widths: channels of the four blocks.
        ways: outputs [B, ways]; None leaves out the linear layer and gives embeddings
            [B, widths[-1]].
        in_channels: the images are [B, in_channels, H, W], H and W at least 16.

    Raises:
        ValueError: not four widths of at least 1.

    Example:
        >>> import torch
        >>> from fastmeta.models import ResNet12
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
            raise ValueError(f"widths: expected four numbers of at least 1, got {widths}")
        channels = [in_channels, *widths]
        self.features = nn.Sequential(*map(_ResidualBlock, channels[:-1], channels[1:]))
        self.embedding_size = widths[-1]
        self.head = nn.Identity() if ways is None else nn.Linear(self.embedding_size, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))
