"""Plans of calls in one kernel: made once for calls that are alike, anew for others."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD


@pytest.fixture(scope="module")
def plans() -> ctypes.CDLL:
    library = emulator.load_kernels(BUILD / "kernels.so")
    library.has_same_plan.restype = library.has_plan.restype = ctypes.c_bool
    return library


def test_calls_that_are_alike_have_one_plan(plans):
    same = [plans.has_same_plan(i, True) for i in range(plans.count_of_same_changes())]
    assert same == [True] * len(same) and same


def test_what_a_plan_depends_on_makes_another_one(plans):
    same = [plans.has_same_plan(i, False) for i in range(plans.count_of_changes())]
    assert same == [False] * len(same) and same


def test_whether_a_plan_fits_is_asked_for_each_size_of_shared_memory(plans):
    fits = []
    for size in (512, 227 * 1024, 512):
        with emulator.shared_memory(size):
            fits.append(plans.has_plan())
    assert fits == [False, True, False]


@pytest.mark.parametrize(
    "keys, made",
    [
        ([], 0),
        ([1, 1, 1], 1),
        ([1, 2, 1, 2], 2),
        ([1, 2, 3, 1], 4),  # 3 pushes 1 out
        ([1, 2, 1, 3, 1], 3),  # 3 pushes 2 out, which was used before 1
    ],
)
def test_entries_used_last_are_kept(plans, keys, made):
    assert plans.count_made((ctypes.c_int64 * len(keys))(*keys), len(keys)) == made
