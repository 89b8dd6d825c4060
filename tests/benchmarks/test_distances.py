"""The benchmark of distances: all contenders compute the same, and a row names the fastest."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.ops import distances

SHAPE = (2, 7, 5, 40)


@pytest.mark.parametrize("contenders", [distances.distances, distances.losses])
def test_the_contenders_agree(contenders):
    e = distances.Episode.draw(SHAPE)
    arguments = (e.x, e.y) if contenders is distances.distances else (e,)
    results = {name: f(*arguments) for name, f in contenders(False).items()}
    for result in results.values():
        torch.testing.assert_close(result, results[distances.OURS], rtol=1e-4, atol=1e-5)


def test_a_row_has_a_time_and_the_fastest_of_the_others():
    shape, *cells = distances.row(SHAPE, rounds=2, compiles=False)
    assert shape == "2, 7, 5, 40"
    assert len(cells) + 1 == len(distances.COLUMNS)
    product = cells.pop(1)
    assert float(product) > 0
    for cell in cells:
        assert re.fullmatch(r"[\d.e-]+ \([\d.]+, (cdist|expanded)\)", cell), cell
