"""The outer step is Adam's or SGD's, whichever implementation runs, on however many threads."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastmeta.training import loop as training
from tests.helpers.runs import equal, maml, protonet, run, sinusoid, weights


@pytest.fixture
def plain_adam(monkeypatch):
    """Within this context training takes PyTorch's Adam with its default options."""
    adam = torch.optim.Adam

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "Adam", lambda params, lr, **_: adam(params, lr))
            yield

    return context


@pytest.mark.parametrize("make", [sinusoid, protonet, maml])
def test_the_outer_step_is_adam(tmp_path, plain_adam, make):
    """The fused one goes through memory in its own order; a ProtoNet's is channels last."""
    fused = run(make(tmp_path / "a", iterations=1))
    with plain_adam():
        plain = run(make(tmp_path / "b", iterations=1))
    for ours, theirs in zip(weights(fused), weights(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_run_begun_with_another_adam_goes_on_with_it(tmp_path, plain_adam):
    with plain_adam():
        straight = run(protonet(tmp_path / "a", iterations=6))
        run(protonet(tmp_path / "b", iterations=3))
    assert equal(straight, run(protonet(tmp_path / "b", iterations=6), resume=True))


@pytest.mark.parametrize(("limit", "stepping"), [(2**18, 1), (0, 3)])
def test_one_thread_takes_a_small_learner_s_outer_step(tmp_path, monkeypatch, limit, stepping):
    monkeypatch.setattr(training, "_SMALL", limit)
    seen = []

    class Spy(torch.optim.Adam):
        def step(self):
            seen.append(torch.get_num_threads())
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    few = run(sinusoid(tmp_path / "few", threads=3))
    assert seen == [stepping] * 4
    monkeypatch.undo()
    assert equal(few, run(sinusoid(tmp_path / "usual", threads=3)))


def test_the_outer_step_is_sgd_where_asked_for(tmp_path):
    start = run(sinusoid(tmp_path / "start", iterations=0))
    moved = [
        run(sinusoid(tmp_path / name, iterations=1, optimizer="sgd", lr=lr))
        for name, lr in (("once", 0.01), ("twice", 0.02))
    ]
    for begun, once, twice in zip(weights(start), *map(weights, moved), strict=True):
        assert not torch.equal(begun, once)
        torch.testing.assert_close(twice - begun, 2 * (once - begun), rtol=1e-3, atol=1e-6)
