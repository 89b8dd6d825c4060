"""Random networks, sizes and options: the compiled ops against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.program_checks import check_random_tasks, kernels
from tests.helpers.programs import ACTIVATIONS

__all__ = ["kernels"]  # a fixture of every test here

WIDTHS = (1, 2, 5, 8, 16, 17, 33)


class RandomNetwork(nn.Module):
    """A graph of up to nine layers and additions, some layers in several places, some frozen."""

    def __init__(self, choices: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.calls: list[tuple[int, int | None, int]] = []  # value, the layer, or what is added
        rows, width = choices.choice((1, 1, 2)), choices.choice(WIDTHS)
        self.shape = (width,) if rows == 1 else (rows, width)
        widths = [width]
        for _ in range(choices.randint(1, 9)):
            value = choices.randrange(max(0, len(widths) - 3), len(widths))
            widths.append(self._extend(choices, widths, value))
        self.calls.append((len(widths) - 1, self._linear(choices, widths[-1], 3), -1))
        self.head = nn.Linear(3 * rows, 3)
        for parameter in self.layers.parameters():
            parameter.requires_grad_(choices.random() > 0.1)

    def _extend(self, choices: random.Random, widths: list[int], value: int) -> int:
        """Adds a call on a value; the width that it gives."""
        width, kind = widths[value], choices.random()
        if kind > 0.8:
            others = [i for i, other in enumerate(widths) if other == width]
            self.calls.append((value, None, choices.choice(others)))
            return width
        if kind > 0.6:
            self.layers.append(nn.LayerNorm(width, elementwise_affine=choices.random() > 0.3))
        elif kind > 0.35:
            self.layers.append(choices.choice(list(ACTIVATIONS.values()))())
        else:
            outputs = choices.choice(WIDTHS)
            self.calls.append((value, self._linear(choices, width, outputs), -1))
            return outputs
        self.calls.append((value, len(self.layers) - 1, -1))
        return width

    def _linear(self, choices: random.Random, inputs: int, outputs: int) -> int:
        """The number of a linear layer, of which some are there already."""
        for i, layer in enumerate(self.layers):
            same = isinstance(layer, nn.Linear) and layer.weight.shape == (outputs, inputs)
            if same and choices.random() > 0.5:
                return i
        self.layers.append(nn.Linear(inputs, outputs, bias=choices.random() > 0.2))
        return len(self.layers) - 1

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
    net = RandomNetwork(choices).to(device, torch.float64)
    check_random_tasks(net, choices, (1, 3, 10, 20), (1, 5, 17), (1, 10))
