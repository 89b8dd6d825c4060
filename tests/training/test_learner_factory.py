"""How a run's options shape its network and the numbers that it computes with."""

from __future__ import annotations

import torch
from torch import nn

from fastmeta.training.learner_factory import build_learner
from tests.helpers.runs import protonet, run


def test_pool_is_how_the_network_halves_images(tmp_path):
    for pool, expected in (("max", 4), ("stride", 0)):
        learner = build_learner(protonet(tmp_path, pool=pool), [1, 16, 16])
        assert sum(isinstance(m, nn.MaxPool2d) for m in learner.modules()) == expected


def test_precision_is_that_of_the_training_step(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_BACKEND", "torch")  # the kernels call no layer
    seen = []
    forward = nn.Conv2d.forward

    def spy(self, x):
        out = forward(self, x)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        result = run(protonet(tmp_path / precision, iterations=1, precision=precision))
        assert set(seen) == {expected}
        assert {p.dtype for p in result.learner.parameters()} == {torch.float32}
