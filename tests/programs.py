"""Networks and losses that task programs have, for their tests; float64, tiny."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.lowering import Lowering, Program
from tests.networks import Tasks

Loss = Callable[[Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(1.5, 2.0),
}


class Residual(nn.Module):
    """x + f(x), and a value that is added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.tanh(self.inner(x))
        return self.head(x + x)


class Tied(nn.Module):
    """One module called twice, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.second(torch.tanh(self.first(x)))


class Unused(nn.Module):
    """A trainable parameter that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(2, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def frozen_body() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def along_the_last_dimension() -> nn.Module:
    """Examples [2, 3]: layers on the last dimension, then all of it flattened."""
    body = [nn.Linear(3, 4), nn.SiLU(), nn.LayerNorm((2, 4)), nn.Linear(4, 2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 3))


# name -> the network, and the shape of an example; three outputs
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 3), (3,)),
    "no_bias": (lambda: nn.Sequential(nn.Linear(3, 3, bias=False)), (3,)),
    **{
        name: (
            lambda make=make: nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 3)),
            (3,),
        )
        for name, make in ACTIVATIONS.items()
    },
    "layer_norm": (
        lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        (3,),
    ),
    "plain_layer_norm": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4, 0.1, elementwise_affine=False), nn.Linear(4, 3)
        ),
        (3,),
    ),
    "layer_norm_without_bias": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3)),
        (3,),
    ),
    "dropout_off": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Identity(), nn.Linear(4, 3)),
        (3,),
    ),
    "deep": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
        ),
        (2, 3),
    ),
    "residual": (Residual, (3,)),
    "tied": (Tied, (3,)),
    "unused": (Unused, (3,)),
    "frozen": (frozen_body, (3,)),
    "last_dimension": (along_the_last_dimension, (2, 3)),
}

CLASS_LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "cross_entropy_sum": nn.CrossEntropyLoss(reduction="sum"),
    "label_smoothing": functools.partial(F.cross_entropy, label_smoothing=0.2),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
}
REGRESSION_LOSSES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "mse_sum": nn.MSELoss(reduction="sum"),
    "bce": F.binary_cross_entropy_with_logits,
    "huber": nn.HuberLoss(delta=0.4),
    "smooth_l1": functools.partial(F.smooth_l1_loss, beta=0.3),
    "l1": nn.L1Loss(),
    "smooth_l1_without_beta": nn.SmoothL1Loss(beta=0.0),
}
LOSSES = {**CLASS_LOSSES, **REGRESSION_LOSSES}


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    net = NETWORKS[name][0]()
    with torch.no_grad():
        for p in net.parameters():  # biases and norms that matter
            p += 0.3 * torch.randn_like(p)
    return net.to(device, dtype)


def lowered(net: nn.Module, loss: Loss, shape: tuple[int, ...]) -> Program:
    program = Lowering(net, loss).program(shape)
    assert isinstance(program, Program), program
    return program


def tasks_for(
    name: str,
    loss: str = "cross_entropy",
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    tasks: int = 3,
    support: int = 4,
    queries: int = 3,
) -> Tasks:
    """Random tasks of a network for a loss: labels of three classes, or targets in [0, 1]."""
    generator = torch.Generator().manual_seed(11)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        shape = (tasks, count, *NETWORKS[name][1])
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if loss in CLASS_LOSSES:
            y = torch.randint(3, (tasks, count), generator=generator)
            y[:, 0] = 0  # one that no loss ignores
        else:
            y = torch.rand(tasks, count, 3, generator=generator, dtype=torch.float64).to(dtype)
        return x.to(device, dtype), y.to(device)

    return Tasks(*examples(support), *examples(queries))


class Raw(NamedTuple):
    """A program with its parameters, as the ops take them."""

    code: Tensor
    theta: Tensor
    frozen: Tensor

    @classmethod
    def of(cls, net: nn.Module, loss: Loss, shape: tuple[int, ...]) -> Raw:
        program = lowered(net, loss, shape)
        theta = program.layout.flatten(dict(net.named_parameters())).detach()
        frozen = torch.cat([theta.new_empty(0), *(p.flatten() for p in program.frozen)])
        return cls(program.code, theta, frozen)
