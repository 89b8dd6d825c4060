"""Networks and losses with task programs, for their tests; float64 and tiny."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.program.lowering import Lowering, Program
from tests.helpers.networks import Tasks

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
    "mish": nn.Mish,
}


class Residual(nn.Module):
    """Residual network: x + f(x), and a value that is added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.tanh(self.inner(x))
        return self.head(x + x)


class Tied(nn.Module):
    """Network with a module that is called twice and a weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.second(torch.tanh(self.first(x)))


class Unused(nn.Module):
    """Network with a trainable parameter on which the outputs do not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(2, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Context(nn.Module):
    """Network that reads a context beside its inputs, and joins two of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.more = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1, 1))
        self.first, self.second = nn.Linear(5, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.context.expand(x.shape[0], -1)], -1)
        y = torch.tanh(self.first(y))
        return self.second(torch.cat((self.more.expand(x.size(0), 1), y, x), dim=1))


def frozen_body() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def along_the_last_dimension() -> nn.Module:
    """Build layers on the last dimension of examples [2, 3], then flatten."""
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
    "context": (Context, (3,)),
    "tied": (Tied, (3,)),
    "unused": (Unused, (3,)),
    "frozen": (frozen_body, (3,)),
    "last_dimension": (along_the_last_dimension, (2, 3)),
}


class ResidualImages(nn.Module):
    """Network that adds an input to its convolution, in both layouts, and a spatial mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = F.silu(self.norm(x)) + x
        return self.head((self.second(x) + x).mean((2, 3)))


class Heads(nn.Module):
    """Network that views images as rows of features, channels first, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rows = nn.Conv2d(2, 3, 2), nn.Linear(2, 2)
        self.norm, self.end = nn.LayerNorm((3, 2, 2)), nn.Conv2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.rows(self.stem(x)))
        return self.end(torch.tanh(x)).view(x.size(0), 3)


class TiedImages(nn.Module):
    """Network with a convolution and a norm that are called twice, pooled twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.pool, self.head = nn.MaxPool2d(2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.twice(x))))
        x = self.pool(torch.relu(self.norm(self.twice(x))))
        return self.head(x.mean((2, 3)))


def frozen_images() -> nn.Module:
    """Build a network in which layers, weights and biases are frozen."""
    body = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*body, nn.Conv2d(3, 3, 2), nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1))
    for parameter in (*net[0].parameters(), net[1].weight, net[4].bias, net[5].bias):
        parameter.requires_grad_(False)
    return nn.Sequential(net, nn.Flatten())


def convolution(*options: int, **more) -> Callable[[], nn.Module]:
    """Build a convolution, tanh and a linear layer with three outputs."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(*options, **more), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))

    return make


def image_layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build a layer on images with four channels, between a convolution and a linear layer."""

    def network() -> nn.Module:
        body = [nn.Conv2d(2, 4, 3, padding=1), make(), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*body, nn.LazyLinear(3))

    return network


def sequences() -> nn.Module:
    """Build a network of all layers on sequences [C, L]."""
    body = [nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.BatchNorm1d(3), nn.ReLU(), nn.MaxPool1d(2)]
    more = [nn.Conv1d(3, 3, 2, dilation=2, groups=3), nn.AvgPool1d(2, 1), nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*body, *more, nn.Flatten(), nn.Linear(3, 3))


def with_running_statistics(net: nn.Module) -> nn.Module:
    """Build the network with tracked running statistics, and put it in evaluation mode."""
    generator = torch.Generator().manual_seed(4)
    for module in net.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.eval()
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net


def running_statistics() -> nn.Module:
    """Build norms on running statistics with the layers fused to them, and a norm without."""
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    tracked = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    second = [nn.Conv2d(4, 3, 2), tracked, nn.ReLU(), nn.Flatten(), nn.Linear(6, 4)]
    third = [nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3)]
    net = with_running_statistics(nn.Sequential(*first, *second, *third))
    return nn.Sequential(nn.BatchNorm2d(1), net)


def norms_of_each_step() -> nn.Module:
    """Build norms with parameters for each inner step, some frozen, one used twice."""
    first = [nn.Conv2d(1, 4, 3, padding=1), fm.models.PerStepBatchNorm2d(4, 2), nn.ReLU()]
    frozen, twice = fm.models.PerStepBatchNorm2d(3, 1), fm.models.PerStepBatchNorm1d(4, 3)
    frozen.weight.requires_grad_(False)
    second = [nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), frozen, nn.Tanh(), nn.Flatten()]
    third = [nn.Linear(6, 4), twice, nn.Tanh(), nn.Linear(4, 4), twice, nn.Linear(4, 3)]
    return nn.Sequential(*first, *second, *third)


# The same for images and sequences. Batch norms in training mode keep running statistics, which
# nothing here uses.
IMAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (convolution(2, 3, 3), (2, 5, 4)),
    "convolution_of_one_channel": (convolution(1, 3, 3, padding=1), (1, 4, 5)),
    "strided": (convolution(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 6, 5)),
    "dilated": (convolution(2, 3, 3, dilation=2, padding="same"), (2, 4, 5)),
    "depthwise": (convolution(3, 6, 3, padding=1, groups=3), (3, 4, 5)),
    "pointwise": (convolution(3, 4, 1), (3, 2, 3)),
    "wide": (convolution(17, 19, 3, padding=1), (17, 3, 3)),
    "batch_norm": (image_layer(lambda: nn.BatchNorm2d(4)), (2, 3, 4)),
    "plain_batch_norm": (image_layer(lambda: nn.BatchNorm2d(4, 0.1, affine=False)), (2, 3, 4)),
    "group_norm": (image_layer(lambda: nn.GroupNorm(2, 4, eps=0.1)), (2, 3, 4)),
    "instance_norm": (image_layer(lambda: nn.InstanceNorm2d(4, affine=True)), (2, 3, 4)),
    "max_pool": (image_layer(lambda: nn.MaxPool2d(2)), (2, 5, 6)),
    "overlapping_max_pool": (image_layer(lambda: nn.MaxPool2d(3, 2, 1)), (2, 5, 6)),
    "average_pool": (image_layer(lambda: nn.AvgPool2d((2, 1))), (2, 5, 3)),
    "padded_average_pool": (image_layer(lambda: nn.AvgPool2d(3, 2, 1)), (2, 5, 3)),
    "average_without_padding": (
        image_layer(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (2, 5, 3),
    ),
    "global_mean": (image_layer(lambda: nn.AdaptiveAvgPool2d(1)), (2, 3, 4)),
    "fused": (
        image_layer(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))),
        (2, 5, 6),
    ),
    "batch_norm_of_features": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        (3,),
    ),
    "sequences": (sequences, (2, 21)),
    "running_statistics": (running_statistics, (1, 4, 7)),
    "norms_of_each_step": (norms_of_each_step, (1, 4, 7)),
    "residual_images": (ResidualImages, (2, 3, 4)),
    "tied_images": (TiedImages, (2, 4, 5)),
    "frozen_images": (frozen_images, (2, 6, 6)),
    "heads": (Heads, (2, 3, 3)),
    "conv4": (lambda: fm.models.Conv4(3, 3, 1, 16), (1, 16, 16)),
    "conv4_of_colours": (lambda: fm.models.Conv4(2, 3, 3, 35), (3, 35, 35)),
    "conv4_stride": (lambda: fm.models.Conv4(3, 3, 1, 20, "stride"), (1, 20, 20)),
    "resnet12": (lambda: fm.models.ResNet12((2, 3, 3, 4), 3, 2), (2, 17, 33)),
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


def shape_of(name: str) -> tuple[int, ...]:
    """Return the shape of an example."""
    return (NETWORKS | IMAGES)[name][1]


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    make, shape = (NETWORKS | IMAGES)[name]
    net = make()
    net(torch.zeros(2, *shape))  # makes lazy layers
    with torch.no_grad():
        for p in net.parameters():  # biases and norms that matter
            p += 0.3 * torch.randn_like(p)
    return net.to(device, dtype)


# Which half of the trainable parameters is adapted, by their order.
HALVES: dict[str, slice] = {"first": slice(0, None, 2), "second": slice(1, None, 2)}
HALVES |= {"front": slice(None, -1), "back": slice(-2, None)}


def adapted_half(net: nn.Module, half: str | None) -> tuple[str, ...] | None:
    """The names of a half of the trainable parameters; None: all of them."""
    if half is None:
        return None
    names = tuple(name for name, p in net.named_parameters() if p.requires_grad)
    return names[HALVES[half]] or names


def lowered(
    net: nn.Module, loss: Loss, shape: tuple[int, ...], adapt: tuple[str, ...] | None = None
) -> Program:
    """Lower a network; norms in evaluation mode use their running statistics."""
    program = Lowering(net, loss, "running", adapt).program(shape)
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
    """Draw random tasks of a network for a loss: labels of three classes, or targets in [0, 1]."""
    generator = torch.Generator().manual_seed(11)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        shape = (tasks, count, *shape_of(name))
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
    def of(
        cls,
        net: nn.Module,
        loss: Loss,
        shape: tuple[int, ...],
        adapt: tuple[str, ...] | None = None,
    ) -> Raw:
        program = lowered(net, loss, shape, adapt)
        theta = torch.cat([p.flatten() for p in program.learned]).detach()
        frozen = torch.cat([theta.new_empty(0), *(p.flatten() for p in program.frozen)])
        return cls(program.code, theta, frozen)
