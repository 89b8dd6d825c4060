"""The benchmark of curvature products: all contenders compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import curvature


@pytest.mark.parametrize("name", ["hvp", "ggnvp"])
def test_contenders_agree_in_double_precision(name):
    problem = curvature.Problem(torch.float64)
    vectors = torch.randn(2, problem.layout.numel, dtype=torch.float64)
    results = {label: f(vectors) for label, f in curvature.contenders(name, problem).items()}
    assert len(results) >= 4
    for result in results.values():
        torch.testing.assert_close(result, results[curvature.OURS], rtol=1e-9, atol=1e-12)


def test_a_row_has_a_cell_for_every_column():
    cells = curvature.row("hvp", 2, 1)
    assert len(cells) == len(curvature.COLUMNS) and all(cells[:-1])


def test_a_wrong_contender_is_named(monkeypatch):
    shared = curvature.shared
    monkeypatch.setattr(curvature, "as_curvlinops", lambda *args: 1.01 * shared(*args))
    with pytest.raises(RuntimeError, match="curvlinops' way: the error of hvp is"):
        curvature.row("hvp", 2, 1)
