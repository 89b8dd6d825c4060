"""What the tests of a run came to, for the runs after it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.cuda_emulation import emulator


@dataclass(frozen=True)
class Record:
    """A test that ran, in which order of threads, and the barriers that it came to."""

    test: str
    passed: bool
    seconds: float
    order: str
    barriers: list[str]


class Recorder:
    """Writes a file of the tests that run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []

    def pytest_runtest_logstart(self) -> None:
        emulator.barriers_since_last_call()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.skipped:
            return
        order = dict(report.user_properties).get("order", "")
        barriers = emulator.barriers_since_last_call()
        record = Record(report.nodeid, report.passed, report.duration, order, barriers)
        self.records.append(record)

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([asdict(record) for record in self.records], indent=1))


def read(folder: Path) -> list[Record]:
    """All that recorders wrote there, the fastest test first."""
    texts = [path.read_text() for path in sorted(folder.glob("*.json"))]
    records = [Record(**fields) for text in texts for fields in json.loads(text)]
    return sorted(records, key=lambda record: record.seconds)
