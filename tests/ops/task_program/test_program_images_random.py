"""Random networks of images, sizes and options: the compiled ops against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from fastmeta.models import PerStepBatchNorm2d
from tests.helpers.program_checks import check_random_tasks, kernels
from tests.helpers.programs import ACTIVATIONS, with_running_statistics

__all__ = ["kernels"]  # a fixture of every test here

CHANNELS = (1, 2, 3, 8, 16, 17)
Size = tuple[int, ...]


def convolution(choices: random.Random, size: Size) -> nn.Module:
    channels, *image = size
    depthwise = choices.random() > 0.75
    outputs = channels * choices.choice((1, 2)) if depthwise else choices.choice(CHANNELS)
    options = {"groups": channels if depthwise else 1, "bias": choices.random() > 0.3}
    padding = choices.choice((0, 1))
    kernel = tuple(choices.randint(1, min(3, n + 2 * padding)) for n in image)
    if choices.random() > 0.7:
        return nn.Conv2d(channels, outputs, 3, padding=2, dilation=2, **options)
    stride = choices.choice((1, 1, 2))
    return nn.Conv2d(channels, outputs, kernel, stride, padding, **options)


def norm(choices: random.Random, size: Size) -> nn.Module:
    channels, affine = size[0], choices.random() > 0.3
    kind = choices.random()
    if kind > 0.8:
        return with_running_statistics(nn.BatchNorm2d(channels, eps=0.1, affine=affine))
    if kind > 0.6:
        return PerStepBatchNorm2d(channels, choices.randrange(3), eps=0.1)
    if kind > 0.3:
        return nn.BatchNorm2d(channels, eps=0.1, affine=affine)
    groups = choices.choice([n for n in range(1, channels + 1) if channels % n == 0])
    return nn.GroupNorm(groups, channels, eps=0.1, affine=affine)


def pool(choices: random.Random, size: Size) -> nn.Module:
    kernel = tuple(choices.randint(1, min(3, n)) for n in size[1:])
    stride, padding = (
        choices.choice((None, 1, 2)),
        tuple(choices.choice((0, n // 2)) for n in kernel),
    )
    if choices.random() > 0.4:
        return nn.MaxPool2d(kernel, stride, padding)
    counted = choices.random() > 0.5
    return nn.AvgPool2d(kernel, stride, padding, count_include_pad=counted)


def block(choices: random.Random, size: Size) -> nn.Module:
    """What is done in one pass: norm, ReLU and, where the image is large enough, 2x2 max pool."""
    pooled = [nn.MaxPool2d(2)] if min(size[1:]) > 1 else []
    return nn.Sequential(norm(choices, size), nn.ReLU(), *pooled)


def activation(choices: random.Random, size: Size) -> nn.Module:
    return choices.choice(list(ACTIVATIONS.values()))()


MAKERS = (convolution, convolution, norm, pool, block, activation)


class RandomImages(nn.Module):
    """A graph of up to nine layers and additions, some layers in several places, some frozen."""

    def __init__(self, choices: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.calls: list[tuple[int, int | None, int]] = []  # value, the layer, or what is added
        self.shape = tuple(choices.choice(sizes) for sizes in (CHANNELS, (1, 4, 7), (3, 6, 9)))
        sizes: list[Size] = [self.shape]
        for _ in range(choices.randint(1, 9)):
            value = choices.randrange(max(0, len(sizes) - 2), len(sizes))
            sizes.append(self._extend(choices, sizes, value))
        self.head = nn.Linear(torch.Size(sizes[-1]).numel(), 3)
        for parameter in self.layers.parameters():
            parameter.requires_grad_(choices.random() > 0.1)

    def _extend(self, choices: random.Random, sizes: list[Size], value: int) -> Size:
        """Adds a call on a value; the size that it gives."""
        size = sizes[value]
        if choices.random() > 0.8:
            others = [i for i, other in enumerate(sizes) if other == size]
            self.calls.append((value, None, choices.choice(others)))
            return size
        again = [layer for at, layer, _ in self.calls if layer is not None and sizes[at] == size]
        if again and choices.random() > 0.7:
            layer = choices.choice(again)
        else:
            self.layers.append(choices.choice(MAKERS)(choices, size))
            layer = len(self.layers) - 1
        self.calls.append((value, layer, -1))
        return tuple(self.layers[layer](torch.zeros(2, *size)).shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for value, layer, other in self.calls:
            x = values[value]
            values.append(x + values[other] if layer is None else self.layers[layer](x))
        return self.head(values[-1].flatten(1))


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed, device):
    choices = random.Random(seed)
    torch.manual_seed(seed)
    net = RandomImages(choices).to(device, torch.float64)
    check_random_tasks(net, choices, (1, 3, 17), (2, 5, 9), (2, 4))
