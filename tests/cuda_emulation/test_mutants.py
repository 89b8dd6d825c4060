"""Barriers are found in the sources, left out, and missed; a mutant that nothing catches fails."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import asdict

import pytest

from tests.cuda_emulation import __main__ as command
from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import BUILD
from tests.cuda_emulation.mutants import MISSED, Hunter, all_mutants
from tests.cuda_emulation.records import Record, read
from tests.cuda_emulation.settings import MIXED, ORDERS, Settings

LAUNCH_FAILURE = 719


def test_there_are_barriers_to_remove():
    assert len(all_mutants()) >= 8


def run(name: str) -> int:
    """The error of a launch of a kernel that has no bug."""
    kernels = emulator.load_kernels(BUILD / "kernels.so")
    numbers = (ctypes.c_float * 128)()
    out = (ctypes.c_float * 128)()
    return kernels.run_kernel(name.encode(), ctypes.c_bool(False), numbers, out)


@pytest.mark.parametrize("kernel", ["barrier_removed", "warp_barrier_removed"])
def test_a_barrier_is_left_out_only_for_a_while(kernel):
    emulator.barriers_since_last_call()
    assert run(kernel) == 0
    places = emulator.barriers_since_last_call()
    assert len(places) == 2 and emulator.barriers_since_last_call() == []
    file, line = places[1].rsplit(":", 1)
    with emulator.without_barrier(file, int(line)):
        assert run(kernel) == LAUNCH_FAILURE
        assert MISSED.search(emulator.report())
    assert run(kernel) == 0


def test_a_mutant_that_no_test_catches_fails(tmp_path):
    mutant = all_mutants()[0]
    test = Record("test", True, 0.1, "natural", [f"{mutant.source}:{mutant.line}"])
    (tmp_path / "tests.json").write_text(json.dumps([asdict(test)]))
    hunter = Hunter([mutant], tmp_path, is_partial=False)
    assert hunter.report(mutant, {}).failed
    assert re.search("of the 0 tests", hunter.report(mutant, {}).longrepr)


def test_a_part_of_the_tests_is_asked_only_for_mutants_that_it_can_see(tmp_path):
    assert Hunter(all_mutants(), tmp_path, is_partial=True).mutants == []
    assert Hunter(all_mutants(), tmp_path, is_partial=False).mutants == all_mutants()


@pytest.mark.parametrize(
    ("share", "codes", "caught", "failed"),
    [
        (1, [0, 0], 20, False),
        (1, [0, 1], 19, True),  # all tests must catch all
        (4, [0, 1], 19, False),
        (4, [1, 1], 17, True),  # more than one in ten survive
        (4, [0, -14], 20, True),  # a process was killed
        (4, [0, 2], 20, True),
    ],
)
def test_a_share_of_the_tests_may_miss_few_mutants(
    share, codes, caught, failed, tmp_path, monkeypatch
):
    mutants = [Record(f"mutant {i}", i < caught, 0.1, "", []) for i in range(20)]
    (tmp_path / "mutants.json").write_text(json.dumps([asdict(record) for record in mutants]))
    monkeypatch.setattr(command, "RECORDS", tmp_path)
    assert command.hunt_failed(codes, share) is failed


def test_records_come_fastest_first(tmp_path):
    slow, fast = (Record(name, True, s, "natural", []) for name, s in (("a", 2.0), ("b", 1.0)))
    for name, record in (("1", slow), ("2", fast)):
        (tmp_path / f"{name}.json").write_text(json.dumps([asdict(record)]))
    assert read(tmp_path) == [fast, slow]


def test_the_date_chooses_among_all_orders_of_a_test():
    days = [Settings(order=MIXED, date=f"2030-01-{day:02}") for day in range(1, 32)]
    assert {day.order_of("test") for day in days} == set(ORDERS)
    assert Settings(order="reversed").order_of("test") == "reversed"


def test_values_are_tested_daily_and_layouts_on_some_days():
    days = [Settings(order=MIXED, date=f"2030-01-{day:02}") for day in range(1, 32)]
    values, layouts = (
        "test_every_op.py::test_float64_reference[a]",
        "test_every_op.py::test_layouts[a]",
    )
    assert all(day.includes(values) for day in days)
    assert {day.includes(layouts) for day in days} == {True, False}
    assert all(day.includes(layouts) == (day.order_of(layouts) == "natural") for day in days)
