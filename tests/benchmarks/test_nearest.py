"""The benchmark of nearest: all contenders find the same, and a line has all columns."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import nearest

SHAPE = (9, 40, 7)


@pytest.mark.parametrize("k", nearest.NEIGHBOURS)
def test_the_contenders_agree(k):
    x, y = nearest.rows(SHAPE)
    contenders = nearest.calls(x, y, k)
    distances, indices = contenders.pop(nearest.OURS)()
    assert contenders.pop("product")().shape == (9, 40)
    for name, call in contenders.items():
        value, index = (torch.as_tensor(z).view(9, k) for z in call())
        assert torch.equal(index, indices)
        squared = value.square() if name == "cdist" else value
        torch.testing.assert_close(squared, distances, rtol=1e-4, atol=1e-4)


def test_a_line_has_a_cell_for_each_column():
    table = nearest.table("ms", [nearest.line(SHAPE, 1, rounds=2), nearest.memory_line(SHAPE, 5)])
    head, rule, *lines = table.splitlines()
    assert len(lines) == 2
    assert {text.count("|") for text in (head, rule, *lines)} == {head.count("|")}
    assert all(float(text.split("|")[3]) >= 0 for text in lines)
