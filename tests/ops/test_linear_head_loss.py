"""The meta-loss of adapted heads in one kernel: against the ops that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.core.backend import HEAD_LOSS, KERNELS
from fastmeta.ops import linear_head_loss as _head_loss
from fastmeta.ops._linear_head_arguments import LOSSES, HeadOptions, checked_head, step_sizes
from fastmeta.ops.linear_head_loss import composed, head_loss
from tests.helpers.assertions import assert_near
from tests.helpers.case import CaseFactory

pytestmark = pytest.mark.skipif(
    (HEAD_LOSS, "cpu") not in KERNELS, reason="the extension has no such kernel"
)

T, S, Q, D = 3, 7, 9, 37
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_form = pytest.mark.parametrize("dual", [False, True])


class Problem:
    def __init__(self, loss: str, steps: int = 3, bias: bool = True, dtype=torch.float64) -> None:
        make = CaseFactory(dtype, "cpu")
        ways = 1 if loss == "logistic" else 5
        shapes = {"x": (T, S, D), "query": (T, Q, D), "weight": (T, ways, D)}
        shapes |= {"bias": (T, ways)} if bias else {}
        self.loss, self.steps = loss, steps
        self.leaves = {name: make.randn(*shape) for name, shape in shapes.items()}
        self.leaves["lr"] = 0.1 * abs(make.randn(T, steps)).float().to(
            torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        )
        self.labels = {}
        for name, count in (("targets", S), ("query_targets", Q)):
            if loss == "mse":
                self.leaves[name] = make.randn(T, count, ways)
            else:
                self.labels[name] = make.labels(max(2, ways), T, count)
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def value(self, function, dual: bool = True, decay: float = 0.0, first_order: bool = False):
        given = self.leaves | self.labels
        head = given["x"], given["targets"], given["weight"], given.get("bias")
        checked = checked_head(*head, self.loss)
        sizes = step_sizes(given["lr"], self.steps, given["x"])
        options = HeadOptions(self.loss, decay, first_order, dual)
        return function(checked, sizes, given["query"], given["query_targets"], options)

    def gradients(self, function, scale: float = 1.0, **options) -> tuple[list[Tensor], list]:
        loss, outputs = self.value(function, **options)
        found = torch.autograd.grad(scale * loss, [*self.leaves.values()], allow_unused=True)
        return [loss, outputs], found


def assert_same(problem: Problem, tolerance: float = 1e-10, **options) -> None:
    ours, grads = problem.gradients(head_loss, **options)
    plain, expected = problem.gradients(composed, **options)
    for actual, wanted in zip(ours, plain, strict=True):
        assert_near(actual, wanted, tolerance)
    for name, actual, wanted in zip(problem.leaves, grads, expected, strict=True):
        if wanted is None or actual is None:  # none is as good as zeros
            assert all(g is None or not g.any() for g in (actual, wanted)), name
        elif wanted.numel():
            assert_near(actual, wanted, tolerance)


@each_form
@each_loss
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_it_is_the_ops_it_stands_for(steps, bias, loss, dual):
    assert_same(Problem(loss, steps, bias), dual=dual)


@each_form
@each_loss
def test_its_options(loss, dual):
    problem = Problem(loss)
    assert_same(problem, dual=dual, decay=0.3)
    assert_same(problem, dual=dual, first_order=True)
    assert_same(problem, dual=dual, scale=-0.7)
    plain = problem.value(head_loss, dual)[0]
    assert abs(problem.value(head_loss, dual, decay=0.3)[0] - plain) > 1e-6


@each_loss
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)]
)
def test_other_dtypes(dtype, tolerance, loss):
    exact, rounded = Problem(loss), Problem(loss, dtype=dtype)
    for name, leaf in exact.leaves.items():
        leaf.data.copy_(rounded.leaves[name])
    (value, outputs), grads = rounded.gradients(head_loss)
    assert (value.dtype, outputs.dtype) == (dtype, dtype)
    plain, expected = exact.gradients(composed)
    for actual, wanted in zip([value, outputs, *grads], [*plain, *expected], strict=True):
        assert_near(actual.double(), wanted, tolerance)


@each_loss
def test_extreme_outputs_have_a_finite_loss(loss):
    problem = Problem(loss, steps=0)
    problem.leaves["weight"].data.mul_(1e3)
    assert problem.value(head_loss)[0].isfinite()
    assert_same(problem)


@each_form
@each_loss
def test_its_gradient_has_derivatives(loss, dual):
    problem = Problem(loss)
    leaves = [*problem.leaves.values()]

    def second(function):
        value = problem.value(function, dual)[0]
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        total = sum((g * g.detach().cos()).sum() for g in grads)
        return torch.autograd.grad(total, leaves)

    for actual, wanted in zip(second(head_loss), second(composed), strict=True):
        assert_near(actual, wanted, 1e-10)


def test_features_without_a_gradient_take_no_work(monkeypatch):
    problem = Problem("cross_entropy")
    kernel, seen = torch.ops.fastmeta.linear_head_loss, []
    monkeypatch.setattr(
        torch.ops.fastmeta, "linear_head_loss", lambda *args: seen.append(args[-1]) or kernel(*args)
    )
    names = ("weight", "bias", "lr")
    problem.leaves["x"].requires_grad_(False), problem.leaves["query"].requires_grad_(False)
    ours, plain = (
        torch.autograd.grad(problem.value(f)[0], [problem.leaves[n] for n in names])
        for f in (head_loss, composed)
    )
    for actual, wanted in zip(ours, plain, strict=True):
        assert_near(actual, wanted, 1e-10)
    problem.leaves["query"].requires_grad_()
    problem.value(head_loss)
    assert seen == [False, True]


def test_a_gradient_is_the_same_twice():
    problem = Problem("cross_entropy")
    loss, _ = problem.value(head_loss)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in problem.leaves.values()]
    loss.backward()
    for leaf, grad in zip(problem.leaves.values(), once, strict=True):
        assert_near(leaf.grad, 2 * grad, 1e-15)


def test_outputs_are_detached_whatever_computes():
    problem = Problem("cross_entropy")
    assert not problem.value(head_loss)[1].requires_grad
    with fm.use_backend("torch"):
        assert not problem.value(head_loss)[1].requires_grad
        assert_same(problem)


@pytest.mark.parametrize("setting", ["torch", "no_grad", "grad", "vmap"])
def test_where_the_ops_run_instead(setting, monkeypatch):
    problem = Problem("cross_entropy")

    def refuse(*_):
        raise AssertionError("the kernel ran")

    expected = problem.value(composed)[0]
    monkeypatch.setattr(_head_loss.HeadLoss, "apply", refuse)
    if setting == "torch":
        with fm.use_backend("torch"):
            found = problem.value(head_loss)[0]
    elif setting == "no_grad":
        with torch.no_grad():
            found = problem.value(head_loss)[0]
    elif setting == "grad":

        def of_query(query: Tensor) -> Tensor:
            problem.leaves["query"] = query
            return problem.value(head_loss)[0]

        query = problem.leaves["query"]
        wanted = torch.autograd.grad(expected, query)[0]
        assert_near(torch.func.grad(of_query)(query.detach()), wanted, 1e-10)
        return
    else:
        query = problem.leaves["query"]

        def value(x: Tensor) -> Tensor:
            problem.leaves["query"] = x
            return problem.value(head_loss)[0]

        found = torch.func.vmap(value)(query.detach()[None])[0]
    assert_near(found, expected, 1e-10)


def test_labels_of_queries_out_of_range():
    problem = Problem("cross_entropy")
    problem.labels["query_targets"][1, 2] = 5
    with pytest.raises(ValueError, match=r"query_targets\[1, 2\] is 5, expected 0 <= label < 5"):
        problem.value(head_loss)
