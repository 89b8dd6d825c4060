"""What vmap refuses, or computes differently without a word, runs one task at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.engines import EXACT, assert_equal, run
from tests.helpers.networks import Tasks, classification
from tests.helpers.unrolled import meta_gradient

LR = torch.tensor(0.1, dtype=torch.float64)


class Halved(torch.autograd.Function):
    """The old form, without setup_context."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.between = between
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(torch.sin(self.body(x))))


def hooked(z: Tensor) -> Tensor:
    if z.requires_grad:
        z.register_hook(lambda grad: grad * 0.5)
    return z


def only_hooked(z: Tensor) -> Tensor:
    z.register_hook(lambda grad: grad * 0.5)
    return z


def scaled_if_trained(z: Tensor) -> Tensor:
    return 2 * z if z.requires_grad else z


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "requires_grad and hook": (hooked, "its forward uses requires_grad"),
    "hook": (only_hooked, "its forward uses register_hook"),
    "requires_grad": (scaled_if_trained, "its forward uses requires_grad"),
    # Tasks that agree on a branch are vmapped; these sums differ.
    "data-dependent branch": (lambda z: z.tanh() if z.sum() else z, "data-dependent"),
    "item": (lambda z: z * z.abs().max().item(), "item"),
    "boolean mask": (lambda z: z + z[z > 0].sum(), "vmap"),
    "autograd Function": (Halved.apply, "setup_context"),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def check(net: nn.Module, tasks: Tasks, reason: str, loss=F.cross_entropy, **options) -> None:
    expected = meta_gradient(net, tasks, loss, LR, 2, options.get("first_order", False))
    with pytest.warns(RuntimeWarning, match=f"{type(net).__name__} runs one task at.*{reason}"):
        actual = run(net, tasks, LR, loss, steps=2, **options)
    if options.get("first_order"):
        expected = expected._replace(support_x=None)
    assert_equal(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a second warning would say nothing new
        assert_equal(run(net, tasks, LR, loss, steps=2, **options), expected)


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("name", BETWEEN)
def test_a_forward_that_vmap_cannot_take(name, first_order, device):
    between, reason = BETWEEN[name]
    net = Net(between).double().to(device)
    check(net, classification("mlp", device), reason, first_order=first_order)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_module(kind, device):
    net = Net().double().to(device)

    def hook(module: nn.Module, *grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(grad * 0.5 for grad in grads[0])

    handle = getattr(net.body if "pre" in kind else net.head, kind)(hook)
    check(net, classification("mlp", device), "has backward hooks")
    handle.remove()
    learner = fm.MAML(net, engine="functional")
    assert "tasks vmapped" in learner.explain()


def test_flags_that_torch_itself_reads_are_vmapped(device):
    net = nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Linear(1, 4),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(), nn.Linear(12, 4),
    ).double().to(device)  # fmt: skip
    tasks = classification("mlp", device)
    expected = meta_gradient(net, tasks, F.cross_entropy, LR, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_equal(run(net, tasks, LR, steps=2), expected, 10 * EXACT)


def test_a_loss_that_vmap_cannot_take(device):
    net, tasks = Net().double().to(device), classification("mlp", device)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.gaussian_nll_loss(outputs, F.one_hot(y, 4).double(), outputs.exp())

    check(net, tasks, "vmap", loss)


def test_explain_gives_the_reason(device):
    net = Net(only_hooked).double().to(device)
    learner = fm.MAML(net)
    with pytest.warns(RuntimeWarning, match="runs one task at a time"):
        learner.meta_loss(*classification("mlp", device))
    assert (
        "without vmap, because Net cannot be vmapped: its forward uses register"
        in learner.explain()
    )
