"""Small networks for the tests, float64, with tasks to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def conv4() -> nn.Module:
    def block(inputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, 4, 3, padding=1)
        return [convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]

    blocks = [*block(1), *block(4), *block(4), *block(4)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4, 4))


class Residual(nn.Module):
    """A stem, one residual block with batch norm, a spatial mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.second = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.second(self.first(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer, and a linear layer on its last output."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.layer = layer(2, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """A transformer block: attention and an MLP, each with layer norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.mlp(self.norms[1](x))).mean(1)


# name -> the network and the shape of one example
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3,)),
    "conv4": (conv4, (1, 16, 16)),
    "residual": (Residual, (1, 6, 6)),
    "gru": (Recurrent, (5, 2)),
    "attention": (Attention, (5, 4)),
}


class Tasks(NamedTuple):
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def build(name: str, device: str, seed: int = 0) -> nn.Module:
    """Build a network by name, with the same weights on every device."""
    torch.manual_seed(seed)
    return NETWORKS[name][0]().double().to(device)


def classification(
    name: str, device: str, tasks: int = 3, support: int = 6, queries: int = 5
) -> Tasks:
    """Draw random examples for a network by name, with labels of four classes."""
    generator = torch.Generator().manual_seed(7)
    shape = NETWORKS[name][1]

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, count, *shape, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (tasks, count), generator=generator)
        return x.to(device), y.to(device)

    return Tasks(*examples(support), *examples(queries))


def regression(device: str, tasks: int = 3, examples: int = 6) -> Tasks:
    """Draw inputs and targets ``[T, S, 1]``."""
    generator = torch.Generator().manual_seed(8)
    shape = (tasks, examples, 1)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return Tasks(*(tensor.to(device) for tensor in tensors))


def regressor(device: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double().to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-300))


def joined(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def half_frozen(device: str) -> nn.Module:
    net = build("mlp", device)
    net[0].weight.requires_grad_(False)
    return net


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Shared(nn.Module):
    """A module with a submodule, a weight and a buffer that are each registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.third = nn.Linear(3, 3, bias=False)
        self.third.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))
        self.third.register_buffer("shift", self.shift)
        self.none = None

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.again(self.first(x))) + self.shift


def parameters_of_tasks(net: nn.Module, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of three tasks near the network's own, and a direction.

    Batch norms lose their running statistics, which vmap could not write.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    torch.manual_seed(2)
    params = {
        name: p.detach() + 0.05 * torch.randn(3, *p.shape).double().to(device)
        for name, p in net.named_parameters()
    }
    return params, {name: torch.randn_like(p) for name, p in params.items()}
