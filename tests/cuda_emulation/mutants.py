"""Mutants of the CUDA kernels: each lacks one barrier, and some test must fail on it.

A barrier tells the emulator where it stands, so the emulator can let threads pass it: no mutant is
compiled. The tests that came to a barrier are on record from the runs before; no other can see it.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.cuda_emulation import emulator
from tests.cuda_emulation.build import ROOT
from tests.cuda_emulation.records import Record, read

CSRC = ROOT / "csrc"
BARRIER = re.compile(r"^ *__sync(threads|warp)\(.*\); *(//.*)?\n", re.MULTILINE)
# The emulator watches shared memory. What goes wrong in global memory shows in the values.
MISSED = re.compile(r"with no barrier between|which no thread has written|assert \S+ <= \(")
SECONDS = 600  # after which a mutant that hangs ends the process
PREFIX = "mutant "  # of its report's name


@dataclass(frozen=True)
class Mutant:
    """The sources without the barrier on `line` of `source`."""

    source: Path
    line: int

    def __str__(self) -> str:
        return f"{PREFIX}{self.source.relative_to(ROOT)}:{self.line}"

    def is_seen_by(self, record: Record) -> bool:
        return f"{self.source}:{self.line}" in record.barriers


def all_mutants() -> list[Mutant]:
    return [
        Mutant(path, text.count("\n", 0, found.start()) + 1)
        for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")])
        for text in [path.read_text()]
        for found in BARRIER.finditer(text)
    ]


class Hunter:
    """Runs mutants, and not the tests that pytest collected but for those that see a mutant.

    Of the tests the fastest is the first; a mutant is caught as soon as one fails.
    """

    def __init__(self, mutants: list[Mutant], records: Path, is_partial: bool) -> None:
        self.records = [record for record in read(records) if record.passed]
        seen = [mutant for mutant in mutants if any(map(mutant.is_seen_by, self.records))]
        self.mutants = seen if is_partial else mutants

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for mutant in self.mutants:
            session.config.hook.pytest_runtest_logreport(report=self.report(mutant, items))
        return True

    def report(self, mutant: Mutant, items: dict[str, pytest.Item]) -> pytest.TestReport:
        """As of a test that passes if a test sees the mutant."""
        seeing = [r for r in self.records if mutant.is_seen_by(r) and r.test in items]
        start = time.monotonic()
        signal.alarm(SECONDS)
        killer = next((r for r in seeing if is_caught(mutant, r.order, items[r.test])), None)
        signal.alarm(0)
        survival = f"{mutant} passes all of the {len(seeing)} tests that come to its barrier"
        return pytest.TestReport(
            nodeid=f"{mutant} by {killer.test}, {killer.order}" if killer else str(mutant),
            location=(str(mutant.source), mutant.line, str(mutant)),
            keywords={},
            outcome="passed" if killer else "failed",
            longrepr=None if killer else survival,
            when="call",
            duration=time.monotonic() - start,
        )


def is_caught(mutant: Mutant, order: str, item: pytest.Item) -> bool:
    """Whether the test fails for a reason that a missing barrier has."""
    item.stash[emulator.ORDER_OF] = order
    with emulator.without_barrier(str(mutant.source), mutant.line):
        reports = runtestprotocol(item, log=False, nextitem=None)
    return any(report.failed and MISSED.search(str(report.longrepr)) for report in reports)
