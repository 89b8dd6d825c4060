"""Networks of today and their few-shot tasks, small enough for a step on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network with the sizes of its tasks: T, K, S and Q; ``ways`` is None for regression."""

    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    tasks: int
    steps: int
    support: int
    queries: int
    lr: float = 0.01
    ways: int | None = 5
    outputs: int = 1

    @property
    def loss(self) -> Loss:
        return F.mse_loss if self.ways is None else F.cross_entropy

    def draw(self) -> list[Tensor]:
        """support_x, support_y, query_x, query_y: random numbers, labels class by class."""
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for count in (self.support, self.queries):
            lead = self.tasks, count
            tensors.append(torch.randn(*lead, *self.input_shape, generator=generator))
            if self.ways is None:
                tensors.append(torch.randn(*lead, self.outputs, generator=generator))
            else:
                tensors.append((torch.arange(count) % self.ways).expand(lead).contiguous())
        return tensors


def mlp(*sizes: int) -> nn.Sequential:
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*[m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())][:-1])


class Attention(nn.Module):
    """Multi-head self-attention, written out: its second derivative is PyTorch's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block with layer norm first."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.norms = Attention(width, heads), nn.ModuleList()
        self.norms.extend(nn.LayerNorm(width) for _ in range(2))
        self.ff = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.ff(self.norms[1](x))


class Transformer(nn.Module):
    """Blocks on tokens ``[S, tokens, width]``, their mean, a linear head."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 128, ways: int = 5) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width, heads, hidden) for _ in range(2)])
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


class ViT(nn.Module):
    """Small vision transformer: patches of 4 x 4 of 28 x 28 pixels, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(49, 64))
        self.body = Transformer()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.patches(x).flatten(2).mT + self.positions)


class Siren(nn.Module):
    """An image as a function of its coordinates (Sitzmann 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


class GRU(nn.Module):
    """A GRU on sequences ``[S, 10, 16]``, written out: PyTorch's layer cannot be vmapped."""

    def __init__(self, inputs: int = 16, hidden: int = 64, ways: int = 5) -> None:
        super().__init__()
        self.hidden = hidden
        self.inputs, self.states = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.head = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        for step in self.inputs(x).unbind(1):
            r, z, n = step.chunk(3, -1)
            hr, hz, hn = self.states(h).chunk(3, -1)
            z = torch.sigmoid(z + hz)
            h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
        return self.head(h)


class MishBlock(nn.Module):
    """Convolution, batch norm, mish and pool, with a 1 x 1 convolution beside them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)
        self.beside = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.mish(self.norm(self.conv(x))) + self.beside(x), 2)


class Mish(nn.Module):
    """Three blocks on images of 3 x 84 x 84, their mean, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(MishBlock(3, 32), MishBlock(32, 32), MishBlock(32, 64))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Residual(nn.Module):
    """Basic block of a ResNet (He 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        convolution = {"padding": 1, "bias": False}
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, **convolution)
        self.second = nn.Conv2d(outputs, outputs, 3, **convolution)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(outputs, track_running_stats=False) for _ in range(2)
        )
        self.beside = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.beside(x))


class ResNet(nn.Module):
    """A ResNet-18 of a quarter of the width, on images of 3 x 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        widths, blocks, inputs = (16, 32, 64, 128), [], 16
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        for i, width in enumerate(widths):
            blocks += [Residual(inputs, width, 1 + (i > 0)), Residual(width, width, 1)]
            inputs = width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


CASES = {
    "omni_mlp": Case(lambda: mlp(784, 256, 128, 64, 64, 5), (784,), 32, 1, 5, 75, 0.4),
    "sin_big": Case(lambda: mlp(1, 40, 40, 1), (1,), 4096, 5, 10, 10, ways=None),
    "transformer": Case(Transformer, (16, 64), 8, 2, 25, 25),
    "siren": Case(Siren, (2,), 16, 3, 1024, 1024, 1e-4, None, 3),
    "gated_mlp": Case(GatedMLP, (64,), 128, 5, 64, 64, ways=None, outputs=64),
    "gru": Case(GRU, (10, 16), 32, 3, 25, 25),
    "vit": Case(ViT, (1, 28, 28), 4, 2, 25, 25),
    "resnet": Case(ResNet, (3, 32, 32), 4, 2, 25, 25),
    "mish": Case(Mish, (3, 84, 84), 16, 3, 5, 15),
}
