"""Sizes of the workloads' networks: parameters in order, operations layer by layer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """A parameter drawn uniformly from `centre` - `bound` to `centre` + `bound`."""

    shape: tuple[int, ...]
    bound: float
    centre: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weight_and_bias(*shape: int) -> list[Parameter]:
    """Weight and bias as PyTorch initialises them: uniform up to 1 / sqrt(inputs of an output)."""
    bound = math.prod(shape[1:]) ** -0.5
    return [Parameter(shape, bound), Parameter(shape[:1], bound)]


@dataclass(frozen=True)
class MLP:
    """Linear layers with ReLU between them."""

    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"MLP {'-'.join(map(str, self.sizes))}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.sizes[:1]

    @property
    def outputs(self) -> int:
        return self.sizes[-1]

    def parameters(self) -> list[Parameter]:
        """Weight [O, I] and bias [O] of each layer."""
        pairs = itertools.pairwise(self.sizes)
        return [p for inputs, outputs in pairs for p in weight_and_bias(outputs, inputs)]

    def layer_flops(self) -> list[int]:
        """Operations of each layer's forward pass on one example."""
        return [2 * inputs * outputs for inputs, outputs in itertools.pairwise(self.sizes)]


@dataclass(frozen=True)
class Conv4:
    """Four times 3x3 convolution, batch norm on batch statistics, ReLU, 2x2 max pool; linear."""

    hidden: int
    ways: int
    channels: int = 1
    image_size: int = 28

    def __str__(self) -> str:
        return f"Conv4-{self.hidden} {self.channels}x{self.image_size}x{self.image_size}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.channels, self.image_size, self.image_size

    @property
    def outputs(self) -> int:
        return self.ways

    @property
    def features(self) -> int:
        """Inputs of the linear layer."""
        return self.hidden * (self.image_size >> 4) ** 2

    def blocks(self) -> list[tuple[int, int]]:
        """Input channels and image size of each block."""
        return [(self.hidden if b else self.channels, self.image_size >> b) for b in range(4)]

    def parameters(self) -> list[Parameter]:
        """Weight and bias of each block's convolution and batch norm, then of the linear layer."""
        h = self.hidden
        norm = [Parameter((h,), 0.0, 1.0), Parameter((h,), 0.0)]
        blocks = [p for c, _ in self.blocks() for p in (*weight_and_bias(h, c, 3, 3), *norm)]
        return [*blocks, *weight_and_bias(self.ways, self.features)]

    def layer_flops(self) -> list[int]:
        """Operations of each convolution and of the linear layer, forward on one example."""
        convolutions = [2 * 9 * c * self.hidden * size**2 for c, size in self.blocks()]
        return [*convolutions, 2 * self.features * self.ways]


@dataclass(frozen=True)
class ContextMLP(MLP):
    """CAVIA: linear layers with ReLU, the first on inputs and on a context, which is adapted."""

    context: int

    def __str__(self) -> str:
        return f"{super().__str__()} with a context of {self.context}"

    @property
    def body(self) -> MLP:
        return MLP((self.sizes[0] + self.context, *self.sizes[1:]))

    def parameters(self) -> list[Parameter]:
        """The context, then weight and bias of each layer."""
        return [Parameter((self.context,), 0.1), *self.body.parameters()]

    @property
    def adapted(self) -> list[bool]:
        """Of each parameter, whether a task adapts it."""
        return [True] + [False] * len(self.body.parameters())

    @property
    def learned(self) -> list[bool]:
        """Of each parameter, whether the outer loop learns it."""
        return [True] * len(self.parameters())

    def layer_flops(self) -> list[int]:
        return self.body.layer_flops()


@dataclass(frozen=True)
class LoraMLP(MLP):
    """LoRA: an MLP that is frozen, and two thin matrices a layer, which are adapted and learned."""

    rank: int

    def __str__(self) -> str:
        return f"{super().__str__()} with LoRA of rank {self.rank}"

    def parameters(self) -> list[Parameter]:
        """Weight and bias of each layer, then its matrices [rank, I] and [O, rank]."""
        found = []
        for inputs, outputs in itertools.pairwise(self.sizes):
            down = Parameter((self.rank, inputs), inputs**-0.5)
            up = Parameter((outputs, self.rank), 0.1)
            found += [*weight_and_bias(outputs, inputs), down, up]
        return found

    @property
    def adapted(self) -> list[bool]:
        return [False, False, True, True] * (len(self.sizes) - 1)

    @property
    def learned(self) -> list[bool]:
        return self.adapted


Network = MLP | Conv4


def parameter_count(network: Network) -> int:
    return sum(parameter.size for parameter in network.parameters())


def draw_parameters(network: Network, generator: np.random.Generator) -> np.ndarray:
    """Draw all parameters in order as one float32 vector [P]."""
    pieces = [
        generator.uniform(p.centre - p.bound, p.centre + p.bound, p.size)
        for p in network.parameters()
    ]
    return np.concatenate(pieces).astype(np.float32)
