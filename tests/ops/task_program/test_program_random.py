"""Random networks, sizes and options: the compiled ops against the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastmeta.ops.task_program import NAMES
from tests.programs import ACTIVATIONS, CLASS_LOSSES, LOSSES, Raw
from tests.test_program import check, kernels

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


def check_random_tasks(
    net: nn.Module,
    choices: random.Random,
    task_counts: Sequence[int],
    supports: Sequence[int],
    queries: Sequence[int],
) -> None:
    """Every op on random tasks of a network with a ``shape``, with random options."""
    loss = choices.choice(list(LOSSES))
    raw = Raw.of(net, LOSSES[loss], net.shape)
    tasks, steps = choices.choice(task_counts), choices.choice((1, 2, 3))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(raw.theta)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        y = numbers(tasks, count, 3).sigmoid()
        if loss in CLASS_LOSSES:
            y = y.argmax(2)
            y[:, 0] = 0  # one that no loss ignores
        return numbers(tasks, count, *net.shape), y

    support, query = examples(choices.choice(supports)), examples(choices.choice(queries))
    rows, columns = choices.choice((1, tasks)), choices.choice((1, raw.theta.numel()))
    lr = 0.05 * numbers(choices.choice((1, steps)), rows, columns)
    if choices.random() > 0.5:
        raw = raw._replace(theta=raw.theta + 0.1 * numbers(tasks, raw.theta.numel()))
    vector = numbers(tasks, raw.theta.shape[-1])
    first_order, keep = choices.random() > 0.7, choices.random() > 0.5
    weights = [choices.choice((0.0, 0.5, -0.3)) for _ in range(choices.choice((0, steps)))]
    wanted = [choices.random() > 0.3 for _ in range(3)]
    arguments = {
        "forward": (support[0],),
        "gradient": (*support, True),
        "hvp": (*support, vector, True),
        "adapt": (lr, *support, steps),
        "adapt_backward": (lr, *support, steps, vector, first_order, keep, *wanted[:2]),
        "meta_gradient": (
            *(lr, *support, *query, weights, steps, first_order, keep, True),
            *wanted,
        ),
    }
    for op in NAMES:
        check(op, *raw, *arguments[op])


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed, device):
    choices = random.Random(seed)
    torch.manual_seed(seed)
    net = RandomNetwork(choices).to(device, torch.float64)
    check_random_tasks(net, choices, (1, 3, 10, 20), (1, 5, 17), (1, 10))
