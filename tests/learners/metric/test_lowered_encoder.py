"""ProtoNet's encoder on fastmeta's kernels."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmeta as fm
from tests.helpers.skips import EMULATED, needs_kernels


def episodes(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, query_x = (torch.randn(2, 6, 1, 28, 28, dtype=dtype) for _ in range(2))
    labels = torch.arange(3).repeat(2, 2)
    return x, labels, query_x, labels


@needs_kernels
@pytest.mark.skipif(EMULATED, reason="the ops are of CPUs only")
@pytest.mark.parametrize("absent", [False, True])
def test_a_step_equals_pytorchs(absent):
    torch.manual_seed(0)
    learner = fm.ProtoNet(fm.models.Conv4(16, None).double())
    plain = fm.ProtoNet(copy.deepcopy(learner.encoder), lower=False)
    x, y, query_x, query_y = episodes()
    if absent:
        y = y.clone()
        y[0, -1] = -1
    for one in (learner, plain):
        loss, _ = one.meta_loss(x, y, query_x, query_y)
        loss.backward()
    for (name, a), (_, b) in zip(learner.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)
    for a, b in zip(learner.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert learner.state_dict().keys() == plain.state_dict().keys()
    assert "The encoder runs on fastmeta's CPU kernels: convolution 1 to 16" in learner.explain()
    assert "encoder runs" not in plain.explain()


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"lower: expected 'auto' or False, got True"):
        fm.ProtoNet(torch.nn.Linear(2, 2), lower=True)
