"""Activations that the functional engine keeps from the inner steps for the adjoint."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.memory import memory_limit
from fastmeta.engines.base import InnerLoopOptions, TaskBatch
from fastmeta.engines.functional.engine import FunctionalEngine
from tests.helpers.engines import run, step_sizes
from tests.helpers.memory import peak_bytes
from tests.helpers.networks import NETWORKS, build, classification

LIMIT = "FASTMETA_MEMORY_LIMIT"


class Counted(nn.Module):
    """A network with dropout that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.forwards = nn.Linear(3, 40), nn.Linear(40, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.5))


def counted(device: str, tasks: int = 3) -> tuple[Counted, TaskBatch]:
    torch.manual_seed(0)
    x, y = torch.randn(tasks, 8, 3, device=device), torch.arange(8, device=device) % 4
    y = y.expand(tasks, 8).contiguous()
    return Counted().to(device), TaskBatch(x, y, x.cos(), y)


def forwards(net: Counted, batch: TaskBatch, **options: object) -> int:
    """Forward passes of a call; one before it has measured the footprint."""
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(4, **options))
    engine.meta_gradient(0.1, batch)
    net.forwards = 0
    engine.meta_gradient(0.1, batch)
    return net.forwards


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_kept_and_recomputed_activations_give_the_same(name, chunk, device):
    net, tasks = build(name, device), classification(name, device)
    options = {"steps": 3, "task_chunk": chunk}
    kept, again = (
        run(net, tasks, step_sizes(net), memory=memory, **options)
        for memory in ("keep", "recompute")
    )
    for found, expected in zip(kept, again, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory", ["keep", "auto"])
def test_dropout_has_the_masks_of_recomputed_activations(memory, device):
    net, batch = counted(device)
    results = []
    for how in (memory, "recompute"):
        engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(3, memory=how))
        torch.manual_seed(5)
        results.append((engine.meta_gradient(0.5, batch).grads, torch.rand(1, device=device)))
    # The numbers drawn afterwards, too: the footprint's measurement leaves no trace.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "passes"),
    [({"memory": "keep"}, 5), ({}, 5), ({"memory": "recompute"}, 9), ({"first_order": True}, 5)],
    ids=str,
)
def test_no_pass_is_taken_twice(options, passes, device):
    """Four steps and the queries; recomputed, four passes more."""
    assert forwards(*counted(device), **options) == passes


@pytest.mark.rotating
def test_the_limit_says_how_many_steps_are_kept(monkeypatch, device):
    net, batch = counted(device, tasks=600)
    monkeypatch.setenv(LIMIT, "0")
    assert forwards(net, batch) == 9
    monkeypatch.setenv(LIMIT, "100000")
    assert forwards(net, batch) == 5
    found = set()
    for mebibytes in range(30):
        monkeypatch.setenv(LIMIT, str(mebibytes))
        found.add(forwards(net, batch))
    assert found == {5, 6, 7, 8, 9}


def test_the_limit_bounds_the_memory(monkeypatch):
    net, batch = counted("cpu", tasks=600)
    engine = FunctionalEngine(net, F.cross_entropy, InnerLoopOptions(8))
    peaks = []
    for limit in ("0", "8", "100000"):
        monkeypatch.setenv(LIMIT, limit)
        engine.meta_gradient(0.1, batch)
        peaks.append(peak_bytes(lambda: engine.meta_gradient(0.1, batch)))
    assert peaks[0] <= peaks[1] < peaks[0] + (9 << 20) < peaks[2]


def test_the_limit_is_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    assert 1 << 20 < memory_limit(torch.device("cpu")) < 1 << 44
    monkeypatch.setenv(LIMIT, "3")
    assert memory_limit(torch.device("cpu")) == 3 << 20
    monkeypatch.setenv(LIMIT, "-3")
    with pytest.raises(ValueError, match="FASTMETA_MEMORY_LIMIT: expected a number of MiB, got"):
        memory_limit(torch.device("cpu"))


class Wide(nn.Module):
    """A step of one task takes tens of MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).repeat(1, 30_000).sin()
        return self.second(x.unflatten(1, (30_000, 4)).mean(1))


def chosen(learner: fm.MAML, batch: TaskBatch) -> str:
    learner.meta_gradient(*batch)
    return learner.explain()


def test_the_number_of_tasks_that_run_together_is_chosen_by_their_size(monkeypatch):
    torch.manual_seed(0)
    _, batch = counted("cpu", tasks=8)
    small = fm.MAML(nn.Linear(3, 4), 0.1, 2, engine="functional")
    assert "up to 8 at a time, because a step of one takes 0.0 MiB" in chosen(small, batch)
    wide = fm.MAML(Wide(), 0.1, 2, engine="functional")
    found = re.search(
        r"up to (\d) at a time, because a step of one takes (.*) MiB", chosen(wide, batch)
    )
    assert int(found[1]) == int(128 / float(found[2])) < 8
    monkeypatch.setenv(LIMIT, "20")
    assert "one at a time, without vmap, because a step of one takes" in chosen(wide, batch)


@pytest.mark.parametrize("limit", ["", "0", "20"])
def test_the_chosen_number_changes_nothing_beyond_rounding(limit, monkeypatch):
    torch.manual_seed(0)
    net, (_, batch) = Wide().double(), counted("cpu", tasks=5)
    batch = TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch.data))
    monkeypatch.setenv(LIMIT, limit)
    found, *expected = (
        fm.MAML(net, 0.1, 2, engine="functional", task_chunk=chunk).meta_gradient(*batch)
        for chunk in ("auto", None, 1)
    )
    for other in expected:
        torch.testing.assert_close(found.grads, other.grads, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.outputs, other.outputs, rtol=1e-12, atol=1e-14)


@pytest.mark.rotating
def test_many_tasks_take_little_more_memory_than_few():
    torch.manual_seed(0)
    net, peaks = Wide(), []
    for tasks in (4, 64):
        _, batch = counted("cpu", tasks)
        learner = fm.MAML(net, 0.1, 3, engine="functional")
        learner.meta_gradient(*batch)  # measures a task
        peaks.append(peak_bytes(lambda: learner.meta_gradient(*batch)))  # noqa: B023
    assert peaks[0] < peaks[1] < 2 * peaks[0]
    assert peaks[1] < memory_limit(torch.device("cpu"))


def test_adaptation_and_evaluation_choose_too(monkeypatch):
    _, batch = counted("cpu", tasks=5)
    wide = fm.MAML(Wide(), 0.1, 2, engine="functional")
    monkeypatch.setenv(LIMIT, "20")
    wide.adapt_tasks(batch.support_x, batch.support_y)
    assert "one at a time, without vmap, because" in wide.explain()


def test_first_order_needs_no_second_derivative_to_choose(device):
    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            pass

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * 2

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))

    _, batch = counted(device)
    learner = fm.MAML(Net(3, 4).to(device), 0.1, 2, first_order=True, engine="functional")
    assert learner.meta_gradient(*batch).grads.isfinite().all()


def test_a_full_memory_names_the_options():
    class Huge(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.zeros(1 << 55, 4)[: len(x)]

    _, batch = counted("cpu")
    learner = fm.MAML(Huge(3, 4), 0.1, 2, engine="functional", memory="keep")
    message = "do not fit in memory. task_chunk=N runs N tasks at a time .now 'auto'., memory='rec"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        learner.meta_gradient(*batch)


@pytest.mark.parametrize("chunk", ["all", 0, True])
def test_a_chunk_that_is_none(chunk):
    with pytest.raises((TypeError, ValueError), match="task_chunk: expected"):
        InnerLoopOptions(task_chunk=chunk)


def test_minibatches_and_learners_take_the_option(device):
    net, batch = counted(device)
    learner = fm.MAML(net, 0.1, 2, memory="keep", engine="functional")
    parameters = learner.adapt_tasks(batch.support_x, batch.support_y)
    assert len(parameters) == 3
