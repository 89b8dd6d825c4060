"""Loops of the CPU kernels on several threads: same bits, from any thread, and after a fork."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm
from tests.helpers.skips import needs_kernels

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def meta_step() -> list[torch.Tensor]:
    """A meta-gradient whose tasks two threads share, and a loss whose rows they share."""
    torch.manual_seed(0)
    learner = fm.MAML(fm.models.MLP([1, 40, 40, 1]), lr=0.1, steps=2, loss=F.mse_loss)
    x, y = torch.randn(2, 26, 10, 1)
    result = learner.meta_gradient(x, y, x, y)
    query, centres = torch.randn(4, 900, 64), torch.randn(4, 60, 64)
    return [result.loss, result.grads, fm.pairwise_distance(query, centres)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


def test_threads_leave_no_mark_and_give_the_same_bits():
    expected = meta_step()
    for _ in range(20):
        assert_same(meta_step(), expected)
    assert torch.get_num_threads() == 2


def test_several_callers_at_once():
    expected = meta_step()

    def of_caller(_: int) -> list[torch.Tensor]:
        torch.set_num_threads(2)  # a setting of each thread
        query, centres = (torch.ones(4, n, 64) * 2 for n in (900, 60))
        return [fm.pairwise_distance(query, centres) for _ in range(30)]

    with ThreadPoolExecutor(4) as callers:
        for distances in callers.map(of_caller, range(8)):
            assert all(not distance.any() for distance in distances)
    assert_same(meta_step(), expected)


def _in_child(end) -> None:
    end.send([tensor.tolist() for tensor in meta_step()])


def test_a_child_process_has_threads_of_its_own():
    expected = [tensor.tolist() for tensor in meta_step()]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(there,))
    child.start()
    try:
        assert here.poll(60), "the child waits for threads that it does not have"
        assert here.recv() == expected
    finally:
        child.kill()
        child.join()
    assert [tensor.tolist() for tensor in meta_step()] == expected
