"""Logits equal easyfsl's, in its configuration. `benchmarks.ops.heads --golden` made its values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ops.heads import PAIRS, Tasks

VALUES = np.load(Path(__file__).with_name("easyfsl.npz"))
COMPARED = [name for name, pair in PAIRS.items() if pair.as_peer]


def test_all_of_its_methods_on_features_are_compared():
    assert set(VALUES.files) == {*COMPARED, *Tasks._fields} and len(COMPARED) == 7


@pytest.mark.parametrize("name", COMPARED)
def test_logits_equal(name):
    pair = PAIRS[name]
    tasks = Tasks(*(torch.from_numpy(VALUES[field]) for field in Tasks._fields))
    logits = pair.as_peer(pair.head(*tasks))
    torch.testing.assert_close(logits, torch.from_numpy(VALUES[name]), rtol=0, atol=pair.tolerance)
