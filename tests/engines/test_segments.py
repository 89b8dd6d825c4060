"""memory="segments": the steps between every ceil(sqrt(K))-th are taken again in the backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.parameter_layout import ParameterLayout
from fastmeta.core.peak_bytes import PeakBytes
from tests.helpers.engines import step_sizes
from tests.helpers.learners import engine
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import Tasks, build, classification, relative_error
from tests.helpers.program_checks import skip_without_program
from tests.helpers.unrolled import meta_gradient
from tests.helpers.unrolled_rules import CASES

__all__ = ["engine"]  # a fixture

each_order = pytest.mark.parametrize("first_order", [False, True])


def rule_of(name: str | None, net: nn.Module, device: str) -> fm.rules.Rule | None:
    return None if name is None else CASES[name](net).rule.to(device)


def gradients(maml: fm.MAML, tasks: Tasks, later: bool) -> list[Tensor]:
    """The gradients to all that is learned and to the data; ``later``: by ``adapt_tasks``."""
    x, query_x = (t.clone().requires_grad_() for t in (tasks.support_x, tasks.query_x))
    torch.manual_seed(3)
    if later:
        adapted = maml.adapt_tasks(x, tasks.support_y)
        loss = F.cross_entropy(adapted(query_x).flatten(0, 1), tasks.query_y.flatten())
    else:
        loss, _ = maml.meta_loss(x, tasks.support_y, query_x, tasks.query_y)
    sources = [p for p in maml.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [*sources, x, query_x], allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None), torch.rand(2)]


@each_order
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("rule", [None, "momentum", "adam", "carried_adam"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 11])
def test_bit_for_bit_as_recomputed(steps, rule, later, first_order, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    options = {"rule": rule_of(rule, net, device), "engine": "functional"}
    again, segments = (
        fm.MAML(net, step_sizes(net), steps, first_order, memory=memory, **options)
        for memory in ("recompute", "segments")
    )
    found, expected = (gradients(maml, tasks, later) for maml in (segments, again))
    assert len(found) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("options", [{}, {"task_chunk": 1}, {"task_chunk": 2}], ids=str)
@pytest.mark.parametrize("name", ["conv4", "gru"])
def test_learned_step_sizes_in_chunks(name, options, later, device):
    net, tasks = build(name, device), classification(name, device)
    again, segments = (
        fm.MAML(net, 0.1, 5, learn_lr=True, memory=m, engine="functional", **options)
        for m in ("recompute", "segments")
    )
    found, expected = (gradients(maml, tasks, later) for maml in (segments, again))
    assert len(found) == len(expected) == 5 + len(list(net.parameters()))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@each_order
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("rule", [None, "momentum", "adam"])
def test_both_engines_give_the_exact_gradient(rule, later, first_order, engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    options = {"rule": rule_of(rule, net, device), "learn_lr": True}
    expected = fm.MAML(net, 0.1, 7, first_order, memory="keep", engine="functional", **options)
    segments = fm.MAML(net, 0.1, 7, first_order, memory="segments", engine=engine, **options)
    found, wanted = (gradients(maml, tasks, later) for maml in (segments, expected))
    assert len(found) == len(wanted)
    for a, e in zip(found, wanted, strict=True):
        assert relative_error(a, e) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_the_gradient_of_an_unrolled_graph(steps, engine, device):
    net, tasks = build("mlp", device), classification("mlp", device)
    expected = meta_gradient(net, tasks, F.cross_entropy, step_sizes(net), steps)
    maml = fm.MAML(net, step_sizes(net), steps, memory="segments", engine=engine)
    found = maml.meta_gradient(*tasks).grads
    assert relative_error(found, ParameterLayout.of(net).flatten(expected.params)) < 1e-10


class Counted(nn.Module):
    """A network with dropout that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.forwards = nn.Linear(3, 40), nn.Linear(40, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.5))


@each_order
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("rule", [None, "adam"])
def test_steps_that_run_again_draw_the_same_numbers(rule, later, first_order, device):
    torch.manual_seed(0)
    net, tasks = Counted().double().to(device), classification("mlp", device)
    again, segments = (
        fm.MAML(net, 0.1, 7, first_order, learn_lr=True, memory=m, rule=rule_of(rule, net, device))
        for m in ("recompute", "segments")
    )
    # The last of the results are numbers drawn afterwards.
    found, expected = (gradients(maml, tasks, later) for maml in (segments, again))
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_queries_between_the_steps_draw_their_own_numbers(device):
    torch.manual_seed(0)
    net, tasks = Counted().double().to(device), classification("mlp", device)
    results = []
    for memory in ("recompute", "segments"):
        torch.manual_seed(5)
        maml = fm.MAML(net, 0.3, 5, memory=memory)
        results.append(maml.meta_gradient(*tasks, [1.0, 0.5, 0.0, 2.0, 1.0]).grads)
    assert torch.equal(*results)


def test_a_backward_may_be_taken_twice(device):
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 6, memory="segments", engine="functional", rule=fm.rules.SGD(0.9))
    value = maml.adapt_tasks(*tasks[:2]).params.square().sum()
    first, second = (
        torch.autograd.grad(value, list(net.parameters()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("steps", "later", "passes"),
    [
        # Nine steps and the queries; of two segments all but the last step; nine for the products.
        (9, False, 9 + 1 + 2 * 2 + 9),
        # The adjoint comes later: three segments.
        (9, True, 9 + 1 + 3 * 2 + 9),
        # Segments of three, and a last one of a single step.
        (7, False, 7 + 1 + 2 * 2 + 7),
        (1, False, 1 + 1 + 0 + 1),
    ],
)
def test_steps_are_taken_again_once(steps, later, passes, device):
    net, tasks = Counted().double().to(device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, steps, memory="segments", task_chunk=None)
    gradients(maml, tasks, later)
    net.forwards = 0
    gradients(maml, tasks, later)
    assert net.forwards == passes


class Wide(nn.Module):
    """A network of many parameters and few activations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1.0, 1.0, 20_000))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scale.cos().mean()


def wide_tasks() -> tuple[Wide, Tasks, int]:
    """The network, three tasks, and the bytes of their parameters."""
    torch.manual_seed(0)
    net, tasks = Wide(), classification("mlp", "cpu")
    tasks = Tasks(*(t.float() if t.is_floating_point() else t for t in tasks))
    return net, tasks, 3 * 4 * ParameterLayout.of(net).numel


# Vectors [T, P] that a step and its derivative work with, for any K; Adam's have the most.
WORKING = 16


@pytest.mark.parametrize("learn_lr", [False, True])
@pytest.mark.parametrize(("rule", "vectors"), [(None, 1), ("momentum", 2), ("adam", 3)])
def test_the_parameters_alive_grow_with_the_root_of_the_steps(rule, vectors, learn_lr):
    """``vectors``: theta and the rule's state; in the segment at work g_k too."""
    net, tasks, theta = wide_tasks()
    net.to(torch.float32)
    rules = {"momentum": fm.rules.SGD(0.9), "adam": fm.rules.Adam(eps=1e-3)}
    alive = {}
    for memory in ("recompute", "segments"):
        for steps in (16, 64):
            maml = fm.MAML(
                net, 0.1, steps, learn_lr=learn_lr, memory=memory, rule=rules.get(rule),
                engine="functional", task_chunk=None,
            )  # fmt: skip
            call = lambda maml=maml: maml.meta_loss(*tasks)  # noqa: E731
            call()
            alive[memory, steps] = peak_bytes(call) / theta
    reads_grads = rule is not None or learn_lr
    for steps in (16, 64):
        root = math.ceil(math.sqrt(steps))
        assert alive["segments", steps] < root * (2 * vectors + reads_grads) + WORKING
        assert alive["recompute", steps] > steps * (vectors + reads_grads)
    grown = alive["segments", 64] - alive["segments", 16]
    # From four starts and four steps to eight of each; the first theta is the module's own.
    assert grown == pytest.approx(4 * (2 * vectors + reads_grads), abs=1.2)


def test_what_adapted_tasks_hold_for_their_backward():
    net, tasks, theta = wide_tasks()
    held = {}
    for memory in ("recompute", "segments"):
        for steps in (16, 64):
            maml = fm.MAML(net, 0.1, steps, memory=memory, engine="functional", task_chunk=None)
            maml.adapt_tasks(*tasks[:2])
            with PeakBytes() as counted:
                adapted = maml.adapt_tasks(*tasks[:2])
                held[memory, steps] = counted.alive / theta
                adapted.params.sum().backward()
            if memory == "segments":
                assert counted.peak / theta < 2 * math.sqrt(steps) + WORKING
    # theta_K, the module's own parameters [P] as theta_0, and what the tape has.
    assert held["segments", 16] == pytest.approx(4 + 1 / 3, abs=0.2)
    assert held["segments", 64] == pytest.approx(8 + 1 / 3, abs=0.2)
    assert held["recompute", 64] == pytest.approx(64 + 1 / 3, abs=0.6)


def test_nothing_is_kept_that_no_backward_reads():
    net, tasks, theta = wide_tasks()
    maml = fm.MAML(net, 0.1, 64, True, memory="segments", engine="functional", task_chunk=None)
    maml.meta_loss(*tasks)
    assert peak_bytes(lambda: maml.meta_loss(*tasks)) / theta < WORKING
    with torch.no_grad():
        assert peak_bytes(lambda: maml.adapt_tasks(*tasks[:2])) / theta < WORKING


def test_steps_of_a_program_are_taken_one_by_one(device):
    skip_without_program(device)
    net, tasks = build("mlp", device), classification("mlp", device)
    maml = fm.MAML(net, 0.1, 3)
    for _ in range(4):
        expected = maml.meta_gradient(*tasks).grads  # the fast path is prepared
    maml.memory = "segments"
    assert "Task program, one call a step" in maml.explain()
    assert relative_error(maml.meta_gradient(*tasks).grads, expected) < 1e-10
    maml.cuda_graph = True
    with pytest.raises(ValueError, match="cuda_graph=True: memory='segments' takes the steps"):
        maml.meta_loss(*tasks)
