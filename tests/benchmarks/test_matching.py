"""The benchmark of matching_loss: contenders agree, and the tables are as documented."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.ops import matching

SHAPE = (2, 6, 10, 5)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_contenders_agree(metric):
    e = matching.Episode.draw(SHAPE)
    values = [loss(e, metric, 1.0) for loss in matching.LOSSES.values()]
    gradients = [torch.autograd.grad(value, (e.query, e.support)) for value in values]
    for value, gradient in zip(values, gradients, strict=True):
        torch.testing.assert_close(value, values[0], atol=1e-4, rtol=1e-4)  # with 1e-6 in the log
        torch.testing.assert_close(gradient, gradients[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("flags", [[], ["--memory"]])
def test_a_table(flags, monkeypatch, capsys):
    monkeypatch.setattr(matching, "SHAPES", [SHAPE])
    monkeypatch.setattr(sys, "argv", ["matching", "--rounds", "2", *flags])
    threads = torch.get_num_threads()
    try:
        matching.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "| T, Q, S, D | fastmeta | exact | attention |"
    cells = lines[-1].strip("| ").split(" | ")
    assert cells[0] == "2, 6, 10, 5"
    assert len([float(cell) for cell in cells[1:]]) == 3
