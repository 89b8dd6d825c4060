"""Memory of large CPU tensors that serves the next ones, in contexts of ``kept_pages``."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastmeta as fm
from fastmeta.core.memory import kept_pages
from tests.helpers.skips import needs_kernels

pytestmark = needs_kernels
LARGE = 1 << 20  # elements: 4 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    fm.release_memory()
    yield
    fm.release_memory()


def address(size: int) -> int:
    """Where a tensor is that is freed at once."""
    return torch.empty(size).data_ptr()


def test_a_large_tensor_takes_the_memory_of_an_earlier_one():
    with kept_pages():
        first = address(LARGE)
        assert address(LARGE) == first
        assert address(LARGE - LARGE // 8) == first  # a little smaller
        assert address(LARGE // 2) != first  # half of it would be wasted
        held = torch.ones(LARGE)
        assert held.data_ptr() == first
        assert address(LARGE) != first
    assert fm.release_memory() >= 4 * LARGE
    assert fm.release_memory() == 0
    assert held.sum() == LARGE


def test_outside_and_for_small_tensors_nothing_is_kept():
    address(LARGE)
    with kept_pages():
        address(1000)
        with kept_pages():
            pass
        address(LARGE)  # still inside
    inside = fm.release_memory()
    assert 4 * LARGE <= inside < 8 * LARGE
    threads = threading.Thread(target=address, args=(LARGE,))
    with kept_pages():  # of this thread only
        threads.start()
        threads.join()
    assert fm.release_memory() == 0


def test_a_tensor_may_outlive_its_context_and_end_in_another_thread():
    with kept_pages():
        tensors = [torch.full((LARGE,), 3.0)]
    assert fm.release_memory() == 0  # it is in use
    assert (tensors[0] == 3).all()
    ending = threading.Thread(target=tensors.clear)
    ending.start()
    ending.join()
    assert fm.release_memory() >= 4 * LARGE


def test_an_error_ends_the_context():
    with pytest.raises(RuntimeError, match="stop"), kept_pages():
        raise RuntimeError("stop")
    address(LARGE)
    assert fm.release_memory() == 0


def test_what_pytorch_does_with_memory_works_in_the_context():
    x = torch.randn(LARGE)
    with kept_pages():
        inside = x.clone()
        # oneDNN takes and frees memory of its own through the allocator.
        assert torch.equal(F.gelu(inside), F.gelu(x))
        inside.resize_(2 * LARGE)
        assert torch.equal(inside[:LARGE], x)
        assert torch.equal(inside[:LARGE].clone().share_memory_(), x)
        assert inside.data_ptr() % 64 == 0
    inside.resize_(3 * LARGE)  # by the same allocator, outside
    assert torch.equal(inside[:LARGE], x)


def test_the_profiler_sees_each_tensor_come_and_leave():
    with kept_pages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(3):
            torch.empty(LARGE)
    sizes = [e.cpu_memory_usage for e in seen.events() if e.name == "aten::empty"]
    assert sizes == [4 * LARGE] * 3
    freed = [e.cpu_memory_usage for e in seen.events() if e.name == "[memory]"]
    assert sum(freed) == -3 * 4 * LARGE


PROGRAM = """
import torch
import fastmeta as fm
from fastmeta.core.memory import kept_pages
with kept_pages():
    for size in (3 << 18, 1 << 18, 1 << 18):  # 3, 1 and 1 MiB of float32
        torch.empty(size)
    held = [torch.empty(1 << 18), torch.empty(3 << 18)]
    del held
print(fm.release_memory() >> 20)
"""


@pytest.mark.rotating
@pytest.mark.parametrize(("limit", "kept"), [("0", 0), ("2", 1)])
def test_the_environment_limits_what_is_kept(limit, kept):
    done = run(PROGRAM, limit)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kept


@pytest.mark.rotating
def test_the_oldest_blocks_make_room():
    program = """
import torch
from fastmeta.core.memory import kept_pages
import fastmeta as fm
with kept_pages():
    for size in (3, 4, 6):
        torch.empty(size << 18)
print(fm.release_memory() >> 20)
"""
    assert int(run(program, "11").stdout) == 10  # the 3 MiB left for the 6


@pytest.mark.rotating
def test_a_limit_that_is_no_number_is_refused():
    done = run(PROGRAM, "much")
    assert done.returncode == 1
    assert "ValueError: FASTMETA_WORKSPACE_MB: expected a number of MiB, got much" in done.stderr


def test_a_process_that_forks_while_memory_is_taken_does_not_hang():
    program = """
import os, threading, torch
from fastmeta.core.memory import kept_pages
stop = threading.Event()
def take():
    with kept_pages():
        while not stop.is_set():
            torch.empty(1 << 20)
thread = threading.Thread(target=take)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        with kept_pages():
            torch.empty(1 << 20)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""
    done = run(program, "")
    assert done.returncode == 0, done.stderr


def run(program: str, limit: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTMETA_WORKSPACE_MB": limit}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_functional_engine_keeps_memory_between_its_calls():
    net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Mish(), torch.nn.Linear(256, 1))
    learner = fm.MAML(net, lr=0.1, steps=2, loss=F.mse_loss, engine="functional")
    x, y = torch.randn(2, 16, 8, 256), torch.randn(2, 16, 8, 1)
    first = learner.meta_gradient(x[0], y[0], x[1], y[1])
    kept = fm.release_memory()
    assert kept > 4 * 16 * 256 * 256  # a task's weights at least
    second = learner.meta_gradient(x[0], y[0], x[1], y[1])
    assert torch.equal(first.grads, second.grads)
    loss, _ = learner.meta_loss(x[0], y[0], x[1], y[1])
    loss.backward()
    adapted = learner.adapt_tasks(x[0], y[0])
    adapted(x[1]).sum().backward()
    assert fm.release_memory() > 0
