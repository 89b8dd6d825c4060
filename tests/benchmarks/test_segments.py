"""The benchmark of many inner steps: both modes compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import segments

SMALL = [segments.Case(rule, 5, 2, (3, 4, 2), 4) for rule in segments.RULES]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.rule)
def test_a_row_has_a_cell_for_every_column(case):
    for rounds in (0, 1):
        name, *cells = segments.row(case, rounds)
        assert name == f"{case.rule}, K = 5"
        assert len(cells) == 2 and all("MiB" in cell for cell in cells)
        assert ("ms" in cells[0]) == bool(rounds)


def test_modes_that_differ_are_named(monkeypatch):
    wrong = {name: lambda n=name: torch.tensor(len(n)) for name in segments.MODES}
    monkeypatch.setattr(segments, "calls", lambda case: wrong)
    wrong["segments"] = lambda: torch.tensor(0)
    with pytest.raises(SystemExit, match="plain descent, K = 5: the modes differ"):
        segments.row(SMALL[0], 0)
