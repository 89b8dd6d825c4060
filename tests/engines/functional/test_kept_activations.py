"""Activations that the functional engine keeps from the inner steps for the adjoint."""

from __future__ import annotations

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


def test_minibatches_and_learners_take_the_option(device):
    net, batch = counted(device)
    learner = fm.MAML(net, 0.1, 2, memory="keep", engine="functional")
    parameters = learner.adapt_tasks(batch.support_x, batch.support_y)
    assert len(parameters) == 3
