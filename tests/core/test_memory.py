"""The memory that is kept between calls: given back, limited, and no less right without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastmeta as fm
from fastmeta.core.cuda_graphs import Graphs
from tests.helpers.skips import needs_kernels


def step() -> torch.Tensor:
    torch.manual_seed(0)
    learner = fm.MAML(fm.models.MLP([1, 40, 1]), lr=0.1, steps=2, loss=F.mse_loss)
    x, y = torch.randn(2, 26, 10, 1)
    return learner.meta_gradient(x, y, x, y).grads


@needs_kernels
def test_workspaces_are_given_back():
    expected = step()
    assert fm.release_memory() > 0
    assert fm.release_memory() == 0
    assert torch.equal(step(), expected)
    assert fm.release_memory() > 0


def test_graphs_are_dropped():
    graphs = Graphs()
    graphs._kept["a kind of call"] = "why it has no graph"
    fm.release_memory()
    assert graphs.refusals() == []


PROGRAM = """
import torch, fastmeta as fm
learner = fm.MAML(fm.models.MLP([1, 40, 1]), loss=torch.nn.functional.mse_loss)
x = torch.randn(26, 10, 1)
learner.meta_gradient(x, x, x, x)
print(fm.release_memory())
"""


def run(limit: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTMETA_WORKSPACE_MB": limit}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )


@pytest.mark.rotating
@needs_kernels
@pytest.mark.parametrize(("limit", "kept"), [("0", False), ("", True), ("64", True)])
def test_the_environment_limits_what_a_thread_keeps(limit, kept):
    done = run(limit)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 0) is kept


@pytest.mark.rotating
@needs_kernels
def test_a_limit_that_is_no_number_is_refused():
    done = run("much")
    assert done.returncode == 1
    assert "ValueError: FASTMETA_WORKSPACE_MB: expected a number of MiB, got much" in done.stderr
