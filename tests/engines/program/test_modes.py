"""Modes of PyTorch that a part of a forward switches, which torch.fx does not record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.engines.program.lowering import Lowering, Program
from tests.helpers.engines import EXACT, assert_equal, run
from tests.helpers.networks import classification, joined, relative_error
from tests.helpers.unrolled import meta_gradient

LR = torch.tensor(0.1, dtype=torch.float64)


class Region(nn.Module):
    """A body in a context, and a head outside of it."""

    def __init__(self, context: Callable[[], AbstractContextManager], norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.context = context
        self.body, self.norm, self.head = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.has_norm, self.casts = norm, False

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            f = torch.tanh(self.body(x))
        if self.casts:
            f = f.to(x.dtype)  # from autocast's
        return self.head(self.norm(f) if self.has_norm else f)


class Decorated(Region):
    """The same by decorators of methods."""

    def __init__(self) -> None:
        super().__init__(torch.no_grad)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@contextmanager
def swallowing() -> Iterator[None]:
    """A context that hides errors, as a forward with a fallback does."""
    try:
        with torch.no_grad():
            yield
    except ValueError:
        pass


REGIONS = {
    "no_grad": lambda: Region(torch.no_grad),
    "no_grad with a norm": lambda: Region(torch.no_grad, norm=True),
    "set_grad_enabled": lambda: Region(lambda: torch.set_grad_enabled(False)),
    "decorator": Decorated,
    "hiding errors": lambda: Region(swallowing),
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_without_gradients(name, tasks):
    net, batch = REGIONS[name]().double(), classification("mlp", "cpu", tasks=tasks)
    assert "computes without gradients" in Lowering(net, F.cross_entropy).program((3,))
    expected = meta_gradient(net, batch, F.cross_entropy, LR, 2)
    nothing = [torch.zeros_like(x) for x in (batch.support_x, batch.query_x)]
    expected = expected._replace(support_x=nothing[0], query_x=nothing[1])
    assert_equal(run(net, batch, LR, steps=2), expected)
    learner = fm.MAML(net, 0.1, 2)
    assert "No task program: model computes without gradients" in learner.explain(*batch[:2])
    found = learner.meta_gradient(*batch).grads
    assert relative_error(found, joined(expected.params.values())) < EXACT


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_mode_does_not_count(outside):
    net = Region(torch.enable_grad)
    with outside():
        assert isinstance(Lowering(net, F.cross_entropy).program((3,)), Program)
        hidden = Region(torch.no_grad)
        assert "computes without" in Lowering(hidden, F.cross_entropy).program((3,))


def test_an_autocast_region():
    """It became float32 in the program, and in the vmapped module."""
    net = Region(lambda: torch.autocast("cpu", torch.bfloat16))
    net.casts = True
    assert "computes under autocast" in Lowering(net, F.cross_entropy).program((3,))
    batch = classification("mlp", "cpu")
    batch = type(batch)(*(x.float() if x.is_floating_point() else x for x in batch))
    expected = meta_gradient(net, batch, F.cross_entropy, LR.float(), 2)
    actual = run(net, batch, LR.float(), steps=2)
    assert_equal(actual, expected, 2e-2)  # bfloat16 has 8 bits
    plain = meta_gradient(Region(torch.enable_grad), batch, F.cross_entropy, LR.float(), 2)
    assert not torch.equal(actual.logits, plain.logits)


def test_an_inference_region_is_refused_with_its_reason():
    net, batch = Region(torch.inference_mode).double(), classification("mlp", "cpu")
    assert "computes in inference mode" in Lowering(net, F.cross_entropy).program((3,))
    for tasks in (batch, type(batch)(*(x[:1] for x in batch))):
        with pytest.raises(RuntimeError, match=r"(?i)inference"):
            fm.MAML(net).meta_loss(*tasks)


class Sloped(nn.Module):
    """Changes a layer's option, or its weight, only while it calls it."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attribute = attribute
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)
        self.activation, self.other = nn.LeakyReLU(0.1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.attribute == "slope":
            self.activation.negative_slope = 0.9
            f = self.activation(self.body(x))
            self.activation.negative_slope = 0.1
            return self.head(f)
        weights = {"weight": self.other.weight, "bias": self.other.bias}
        return self.head(self.activation(torch.func.functional_call(self.body, weights, (x,))))


@pytest.mark.parametrize("attribute", ["slope", "weight"])
def test_a_layer_that_differs_while_it_is_called(attribute):
    net, batch = Sloped(attribute).double(), classification("mlp", "cpu")
    learner = fm.MAML(net, 0.1, 2)
    expected = joined(meta_gradient(net, batch, F.cross_entropy, LR, 2).params.values())
    assert relative_error(learner.meta_gradient(*batch).grads, expected) < EXACT
