"""The updates of inner rules by themselves: golden numbers, derivatives, and what they refuse."""

from __future__ import annotations

import doctest
import inspect
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.rules.base import Step
from tests.helpers.networks import regressor
from tests.helpers.unrolled_rules import CASES

each_rule = pytest.mark.parametrize("name", CASES)


@each_rule
def test_updates_pass_gradcheck(name, device):
    net = regressor(device)
    case = CASES[name](net)
    size = sum(p.numel() for p in net.parameters())
    generator = torch.Generator().manual_seed(4)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    inputs = [make(2, size), make(2, size), 0.1 + make(1, size).abs()]
    inputs += [make(2, size).square() + 0.5 for _ in range(case.rule.states)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def update(theta, grads, lr, *state):
        after, state = case.rule.step(Step(1, theta, grads, lr, state))
        return after, *state

    assert torch.autograd.gradcheck(update, inputs)


@pytest.mark.parametrize(
    ("rule", "slope"),
    [
        (fm.rules.Adam(eps=0.04), -0.3 / 0.2),
        (fm.rules.Adam((0.0, 0.5), eps=0.04), -0.3 / 0.2),
        (fm.rules.RMSProp(eps=0.04), -0.3 / 0.2),
        (fm.rules.ClipNorm(2.0), -0.3),
        (fm.rules.ClipValue(2.0), -0.3),
        (fm.rules.Adam(), -0.3 / 1e-4),
        (fm.rules.RMSProp(), -0.3 / 1e-4),
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_the_derivative_at_a_zero_gradient(rule, slope, device):
    """All of them are ``theta - lr g / sqrt(eps)`` there, or ``theta - lr g``, to first order."""
    theta, grads = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    lr = torch.full((1, 1), 0.3, dtype=torch.float64)
    state = rule.start(theta)
    back = rule.vjp(Step(0, theta, grads, lr, state), torch.ones_like(theta), state, {"grads"})
    assert torch.equal(back.theta, torch.ones_like(theta))
    torch.testing.assert_close(back.grads, torch.full_like(grads, slope), rtol=1e-12, atol=0)
    assert all(tensor.isfinite().all() for tensor in back.state)
    assert torch.equal(rule.step(Step(0, theta, grads, lr, state))[0], theta)


def trajectory(rule: fm.rules.Rule, gradients: list[float]) -> list[float]:
    """theta of one task with one parameter, from 1 with step size 1."""
    like = {"dtype": torch.float64}
    theta, lr = torch.ones(1, 1, **like), torch.ones(1, 1, **like)
    state, seen = rule.start(theta), []
    for k, g in enumerate(gradients):
        theta, state = rule.step(Step(k, theta, torch.full((1, 1), g, **like), lr, state))
        seen.append(theta.item())
    return seen


@pytest.mark.parametrize(
    ("rule", "gradients", "expected"),
    [
        (fm.rules.SGD(0.5), [0.5, 0.25], [0.5, 0.0]),
        (fm.rules.SGD(0.5, nesterov=True), [0.5, 0.25], [0.25, -0.25]),
        (fm.rules.SGD(weight_decay=0.5), [0.5, 0.25], [0.0, -0.25]),
        (fm.rules.Adam((0.0, 0.0), eps=0.75), [0.5, 0.5], [0.5, 0.0]),
        (fm.rules.Adam((0.5, 0.0), eps=0.75), [0.5, 0.0], [0.5, 0.5 - 1 / 6 / 0.75**0.5]),
        (fm.rules.Adam((0.0, 0.5), eps=0.75), [0.5, 0.0], [0.5, 0.5]),
        (fm.rules.Adam((0.0, 0.0), 3.0, 1.0), [0.0], [0.5]),
        (fm.rules.RMSProp(0.0, eps=0.75), [0.5], [0.5]),
        (fm.rules.RMSProp(0.5, eps=0.875), [0.5], [0.5]),
        (fm.rules.RMSProp(0.0, 3.0, 1.0), [0.0], [0.5]),
        (fm.rules.ClipValue(0.25), [0.5, -0.5, 0.125], [0.75, 1.0, 0.875]),
        (fm.rules.ClipNorm(0.25), [0.5, -0.5, 0.125], [0.75, 1.0, 0.875]),
        (fm.rules.ClipNorm(0.25, fm.rules.SGD(0.5)), [0.5, 0.0], [0.75, 0.625]),
        (fm.rules.Proximal(0.5), [0.5, 0.0, 0.0], [0.5, 0.75, 0.875]),
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_golden_steps(rule, gradients, expected):
    """Worked out by hand: each option changes one of these numbers."""
    assert trajectory(rule, gradients) == pytest.approx(expected, rel=1e-14)


def test_the_norm_is_that_of_each_task():
    rule, lr = fm.rules.ClipNorm(1.0), torch.ones(1, 1)
    grads = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    after, _ = rule.step(Step(0, torch.zeros(2, 2), grads, lr))
    torch.testing.assert_close(after, torch.tensor([[-0.6, -0.8], [-0.3, -0.4]]))


NUMBER = "expected a number or an nn.Parameter, got str"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.rules.SGD("0.9"), TypeError, f"momentum: {NUMBER}"),
        (lambda: fm.rules.SGD(True), TypeError, "momentum: expected a number"),
        (lambda: fm.rules.SGD(torch.tensor(0.9)), TypeError, "momentum: .*Parameter, got Tensor"),
        (lambda: fm.rules.SGD(1.0), ValueError, r"momentum: expected a number in \[0, 1\), got 1"),
        (lambda: fm.rules.SGD(-0.1), ValueError, "momentum: .*got -0.1"),
        (
            lambda: fm.rules.SGD(nesterov=True),
            ValueError,
            "nesterov: expected False without moment",
        ),
        (lambda: fm.rules.SGD(0.9, nesterov=1), TypeError, "nesterov: expected a bool, got 1"),
        (lambda: fm.rules.SGD(weight_decay=-1), ValueError, r"weight_decay: .*\[0, inf\), got -1"),
        (lambda: fm.rules.SGD(float("nan")), ValueError, "momentum: .*got nan"),
        (lambda: fm.rules.Adam(0.9), TypeError, "betas: expected a pair of numbers, got 0.9"),
        (lambda: fm.rules.Adam((0.9, 1.0)), ValueError, r"betas\[1\]: .*got 1.0"),
        (lambda: fm.rules.Adam((-1, 0.9)), ValueError, r"betas\[0\]: .*got -1"),
        (lambda: fm.rules.Adam(eps=0.0), ValueError, "eps: expected a number above 0, got 0"),
        (lambda: fm.rules.Adam(weight_decay=-1), ValueError, "weight_decay: .*got -1"),
        (lambda: fm.rules.RMSProp(1.0), ValueError, "alpha: .*got 1.0"),
        (lambda: fm.rules.RMSProp(eps=0), ValueError, "eps: expected a number above 0, got 0"),
        (lambda: fm.rules.RMSProp(weight_decay="a"), TypeError, f"weight_decay: {NUMBER}"),
        (lambda: fm.rules.ClipValue(0), ValueError, "limit: expected a number above 0, got 0"),
        (lambda: fm.rules.ClipNorm(-1), ValueError, "limit: .*got -1"),
        (lambda: fm.rules.ClipNorm(1, "adam"), TypeError, "rule: expected a .*Rule, got str"),
        (lambda: fm.rules.Proximal(-1), ValueError, "strength: .*got -1"),
        (lambda: fm.rules.Proximal(1, 2), TypeError, "rule: expected a .*Rule, got int"),
        (lambda: fm.rules.MetaCurvature(nn.ReLU()), ValueError, "no trainable parameter"),
        (
            lambda: fm.rules.ClipNorm(nn.Parameter(torch.ones(3))),
            ValueError,
            r"limit: expected one number, got shape \[3\]",
        ),
        (
            lambda: fm.rules.SGD(nn.Parameter(torch.tensor(1), requires_grad=False)),
            TypeError,
            "momentum: expected a floating-point parameter, got torch.int64",
        ),
        (
            lambda: fm.MAML(nn.Linear(3, 2), rule="adam"),
            TypeError,
            "rule: expected a fastmeta.rules.Rule, got str",
        ),
        (
            lambda: fm.MAML(nn.Linear(3, 2), rule=fm.rules.SGD(nn.Parameter(torch.ones(5)))),
            ValueError,
            r"momentum: expected shape \[\], \[1\] or \[P\] with P = 8, got \[5\]",
        ),
        (
            lambda: fm.MAML(nn.Linear(3, 2), rule=fm.rules.MetaCurvature(nn.Linear(3, 1))),
            ValueError,
            "rule: expected the trainable parameters that MetaCurvature was made for",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", fm.rules.__all__)
def test_examples_of_the_docstrings(name):
    rule = getattr(fm.rules, name)
    names = {"torch": torch, "fm": fm}
    tests = [t for t in doctest.DocTestFinder().find(rule, extraglobs=names) if t.examples]
    assert tests, f"{name} has no example"
    runner = doctest.DocTestRunner()
    assert not any(runner.run(test).failed for test in tests)


def test_every_rule_is_compared_with_one_by_hand():
    by_hand = set()
    for make in CASES.values():
        rule = make(nn.Linear(3, 2)).rule
        by_hand |= {type(module).__name__ for module in rule.modules()}
    assert set(fm.rules.__all__) - {"Rule"} <= by_hand
    assert all(inspect.getdoc(getattr(fm.rules, name)) for name in fm.rules.__all__)


def test_updates_are_those_of_torch_where_it_has_them(device):
    """With its epsilon made small enough not to matter where it stands."""
    pairs = {
        fm.rules.SGD(0.9): lambda p: torch.optim.SGD(p, 0.1, 0.9),
        fm.rules.SGD(0.9, True, 0.1): lambda p: torch.optim.SGD(
            p, 0.1, 0.9, weight_decay=0.1, nesterov=True
        ),
        fm.rules.Adam(eps=1e-30, weight_decay=0.1): lambda p: torch.optim.Adam(
            p, 0.1, eps=1e-15, weight_decay=0.1
        ),
        fm.rules.RMSProp(eps=1e-30): lambda p: torch.optim.RMSprop(p, 0.1, eps=1e-15),
    }
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(4, 1, 5, generator=generator, dtype=torch.float64)
    for rule, make in pairs.items():
        theta = torch.ones(1, 5, dtype=torch.float64)
        parameter = nn.Parameter(theta.clone())
        optimizer, state = make([parameter]), rule.start(theta)
        seen = [theta]
        for k, g in enumerate(gradients):
            parameter.grad = g.clone()
            optimizer.step()
            lr = torch.full((1, 1), 0.1, dtype=torch.float64)
            theta, state = rule.step(Step(k, theta, g, lr, state))
            seen.append(theta)
            torch.testing.assert_close(theta, parameter.detach(), rtol=1e-12, atol=1e-12)
        assert all(not torch.equal(a, b) for a, b in pairwise(seen))
