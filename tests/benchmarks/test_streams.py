"""The benchmark of streams: all contenders compute the same."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from benchmarks.ops import streams

SMALL = streams.Case("ttt_mlp", 2, 3, 4, 4, 6), streams.Case("titans", 3, 1, 4, 4, 6)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_row_has_a_cell_for_every_column(case):
    name, *cells = streams.row(case, 1, compiles=False)
    assert name.startswith(case.name)
    has_jax = find_spec("jax") is not None
    assert [bool(cell) for cell in cells] == [True, case.steps > 1, True, False, has_jax]
    assert len(cells) == len(streams.COLUMNS)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_compiled_contender_computes_the_same(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem = streams.Problem(case)
    for found, expected in zip(streams.compiled(problem)(), streams.unrolled(problem), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_wrong_contender_is_named(monkeypatch):
    ours = streams.ours
    wrong = lambda *args: [1.01 * grads for grads in ours(*args)]  # noqa: E731
    monkeypatch.setattr(streams, "ours", wrong)
    with pytest.raises(SystemExit, match=r"ttt_mlp: fastmeta differs from torch\.func by"):
        streams.row(SMALL[0], 1, compiles=False)
