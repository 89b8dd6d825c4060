"""The benchmark of ridge_head: all contenders fit the same head."""

from __future__ import annotations

from benchmarks.ops import ridge_head


def test_contenders_agree_and_a_row_has_its_columns():
    cells = [ridge_head.speeds((2, 6, 5, 3), intercept, rounds=2) for intercept in (True, False)]
    assert 1 + len(cells[0]) + len(cells[1]) == len(ridge_head.COLUMNS)
    assert all(float(cell) > 0 for row in cells for cell in row)
