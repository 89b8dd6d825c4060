"""Tensors that reach the inner loop by another way than the module's parameters and the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.helpers.engines import EXACT
from tests.helpers.networks import Tasks, classification, relative_error

LR, K = 0.1, 2


class Tempered(nn.Module):
    """A learned loss."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.temperature, y)


class Scaled(nn.Module):
    """Reads a tensor that it does not own."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4).double()
        self.scale = [scale]  # in a list: not registered

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(x)) * self.scale[0]


class Attribute(Scaled):
    def __init__(self, scale: Tensor) -> None:
        super().__init__(scale)
        self.factor = scale.detach().requires_grad_() if scale.is_leaf else scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(x)) * self.factor


class Problem:
    """A module, a loss, the outer tensors, and the leaves that have to get a gradient."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        scale = torch.rand(4, dtype=torch.float64)
        self.outer: list[Tensor] = []
        if kind == "loss module":
            self.loss = Tempered()
            self.net: nn.Module = nn.Linear(3, 4).double()
            self.leaves = list(self.loss.parameters())
        elif kind == "closure":
            scale.requires_grad_()
            self.loss = lambda outputs, y: F.cross_entropy(outputs * scale, y)
            self.net = nn.Linear(3, 4).double()
            self.outer = self.leaves = [scale]
        elif kind == "unregistered":
            scale.requires_grad_()
            self.net = Scaled(scale)
            self.outer = self.leaves = [scale]
        else:
            hypernetwork = nn.Linear(4, 4).double()
            output = hypernetwork(scale)
            self.net = Scaled(output)
            self.outer, self.leaves = [output], list(hypernetwork.parameters())
        self.params = dict(self.net.named_parameters())

    def learner(self, **options: object) -> fm.MAML:
        return fm.MAML(
            self.net, LR, K, loss=self.loss, outer=self.outer, engine="functional", **options
        )

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [*self.params.values(), *self.leaves]))

    def unrolled(self, tasks: Tasks, weights: list[float], first_order: bool = False) -> Tensor:
        losses = []
        for x, y, q, z in zip(*tasks, strict=True):
            fast = dict(self.params)
            for k in range(K):
                value = self.loss(functional_call(self.net, fast, (x,)), y)
                grads = torch.autograd.grad(
                    value, list(fast.values()), create_graph=not first_order, retain_graph=True
                )
                pairs = zip(fast.items(), grads, strict=True)
                fast = {name: p - LR * g for (name, p), g in pairs}
                losses.append(weights[k] * self.loss(functional_call(self.net, fast, (q,)), z))
        return torch.stack(losses).sum() / len(tasks.support_x)


KINDS = ["loss module", "closure", "unregistered", "hypernetwork"]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT) -> None:
    for got, value in zip(actual, expected, strict=True):
        assert relative_error(got, value) < tolerance


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]], ids=["last", "every step"])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_exact(kind, tasks, weights):
    data = classification("mlp", "cpu", tasks=tasks)
    expected = Problem(kind)
    expected = expected.gradients(expected.unrolled(data, weights or [0.0, 1.0]))
    for options in ({}, {"task_chunk": 2}, {"hvp_mode": "forward"}):
        problem = Problem(kind)
        loss, _ = problem.learner(**options).meta_loss(*data, step_weights=weights)
        assert_near(problem.gradients(loss), expected)
    problem = Problem(kind)
    loss, _ = problem.learner(hvp_mode="finite_difference").meta_loss(*data, step_weights=weights)
    assert_near(problem.gradients(loss), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_first_order(kind):
    """The way through the inner gradients is left out, as for the support."""
    data = classification("mlp", "cpu")
    expected = Problem(kind)
    expected = expected.gradients(expected.unrolled(data, [0.0, 1.0], first_order=True))
    problem = Problem(kind)
    loss, _ = problem.learner(first_order=True).meta_loss(*data)
    assert_near(problem.gradients(loss), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_tasks_are_differentiable(kind):
    data = classification("mlp", "cpu")
    expected, problem = Problem(kind), Problem(kind)
    expected = expected.gradients(expected.unrolled(data, [0.0, 1.0]))
    adapted = problem.learner().adapt_tasks(*data[:2])
    outputs = adapted(data.query_x)
    losses = [problem.loss(o, z) for o, z in zip(outputs, data.query_y, strict=True)]
    assert_near(problem.gradients(torch.stack(losses).mean()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_takes_the_steps(kind):
    data = classification("mlp", "cpu")
    expected, problem = Problem(kind), Problem(kind)
    expected = expected.gradients(expected.unrolled(data, [0.0, 1.0]))
    rule = fm.rules.ClipNorm(1e9)  # of a norm that no gradient has
    loss, _ = problem.learner(rule=rule).meta_loss(*data)
    assert_near(problem.gradients(loss), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient_assigns_it(kind):
    data = classification("mlp", "cpu")
    expected, problem = Problem(kind), Problem(kind)
    expected = expected.gradients(expected.unrolled(data, [0.0, 1.0]))
    learner = problem.learner()
    result = learner.meta_gradient(*data)
    assert len(result.outer_grads) == len(learner.outer_tensors)
    result.assign_to(learner)
    found = [p.grad for p in (*problem.params.values(), *problem.leaves)]
    assert_near(found, expected)


def of_closure() -> tuple[nn.Module, Callable]:
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    return nn.Linear(3, 4).double(), lambda outputs, y: F.cross_entropy(outputs * scale, y)


def of_attribute() -> tuple[nn.Module, Callable]:
    return Attribute(torch.ones(4, dtype=torch.float64)), F.cross_entropy


def of_list() -> tuple[nn.Module, Callable]:
    return Scaled(torch.ones(4, dtype=torch.float64, requires_grad=True)), F.cross_entropy


def of_decay() -> tuple[nn.Module, Callable]:
    net = nn.Linear(3, 4).double()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + sum(p.square().sum() for p in net.parameters())

    return net, loss


LOST = {
    of_closure: r"scale of loss, a tensor of shape \[4\], requires a gradient and is no input",
    of_attribute: r"model.factor, a tensor of shape \[4\], requires a gradient and is no input",
    of_list: r"a tensor of shape \[4\] that the module or the loss reads requires a gradient",
    of_decay: r"loss: the module's parameter '(weight|bias)', which it reads at its value before",
}


@pytest.mark.parametrize("make", LOST, ids=lambda make: make.__name__)
def test_a_tensor_whose_gradient_would_be_lost(make):
    net, loss = make()
    data = classification("mlp", "cpu")
    learner = fm.MAML(net, LR, K, loss=loss)
    for call in (
        lambda: learner.meta_loss(*data),
        lambda: learner.meta_gradient(*data),
        lambda: learner.adapt_tasks(*data[:2]),
        lambda: fm.IMAML(net, LR, K, loss).meta_loss(*data),
        lambda: fm.Reptile(net, LR, K, loss=loss).meta_loss(*data),
    ):
        with pytest.raises(ValueError, match=LOST[make]):
            call()
    with torch.no_grad():  # where no gradient is asked for none is lost
        learner.meta_loss(*data)
        learner.adapt_tasks(*data[:2])


def test_learners_with_a_gradient_of_their_own():
    data = classification("mlp", "cpu")
    learner = fm.Reptile(nn.Linear(3, 4).double(), loss=Tempered())
    with pytest.raises(ValueError, match="outer: Reptile has a gradient to the module's param"):
        learner.meta_loss(*data)


def test_a_rule_that_reads_a_tensor_of_its_own():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Scaling(fm.rules.Rule):
        def update(self, theta, grads, lr, state, k):
            return theta - lr * scale * grads, state

    learner = fm.MAML(nn.Linear(3, 4).double(), LR, K, rule=Scaling())
    with pytest.raises(ValueError, match=r"rule: Scaling reads a tensor of shape \[\] that req"):
        learner.meta_loss(*classification("mlp", "cpu"))


def test_outer_takes_tensors():
    with pytest.raises(TypeError, match="outer: expected tensors, got Linear"):
        fm.MAML(nn.Linear(3, 2), outer=[nn.Linear(1, 1)])
