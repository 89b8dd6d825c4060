"""Meta-gradients of learners on one small problem, with either engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from tests.helpers.networks import Tasks, build, classification, relative_error

EXACT = 1e-9


K = 3  # steps


ENGINES = ["functional", "program"]


@pytest.fixture(params=ENGINES)
def engine(request, device):
    if (
        request.param == "program"
        and (fm.core.backend.PROGRAM, device) not in fm.core.backend.KERNELS
    ):
        pytest.skip(f"the extension has no task program for {device}")
    return request.param


@pytest.fixture
def problem(device) -> tuple[nn.Module, Tasks]:
    return build("mlp", device), classification("mlp", device)


def gradient(learner: fm.MAML, tasks: Tasks) -> Tensor:
    """Compute the meta-gradient by ``backward``, and check it against ``meta_gradient``."""
    twin = copy.deepcopy(learner)  # one that has made as many meta-losses
    torch.manual_seed(0)
    value = twin.meta_gradient(*tasks)
    learner.zero_grad()
    torch.manual_seed(0)
    loss, logits = learner.meta_loss(*tasks)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in learner.module.parameters()])
    assert relative_error(grads, value.grads) < 1e-12
    assert relative_error(loss.detach(), value.loss) < 1e-12
    assert relative_error(logits, value.outputs) < 1e-12
    return grads
