"""Log of a run: one line of JSON per iteration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastmeta.training.files import write_atomically

_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make a new encoder each time


class MetricsLog:
    """Metrics of a run as lines of JSON, one per iteration and each iteration once.

    A killed run may leave lines after its last checkpoint, and an incomplete one at the end.
    Opening the log drops them: only iterations up to ``keep`` stay, from which a run resumes.

    Args:
        path: the file.
        keep: the last iteration to keep; 0 starts an empty log.

    Raises:
        OSError: the file cannot be written, or is absent although ``keep`` is not 0.
        ValueError: the file lacks a complete line for one of the iterations 1 to ``keep``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsLog(path) as log:
        ...     log.append({"iteration": 1, "loss": 0.5})
        ...     log.append({"iteration": 2, "loss": 0.4})
        >>> with MetricsLog(path, keep=1) as log:
        ...     log.append({"iteration": 2, "loss": 0.3})
        >>> read_metrics(path)
        [{'iteration': 1, 'loss': 0.5}, {'iteration': 2, 'loss': 0.3}]
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        kept = "".join(_kept_lines(path, keep)) if keep else ""
        write_atomically(path, lambda file: file.write(kept.encode()))
        # Line buffering passes every record to the system in one write.
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """Add one record, which has an ``iteration`` and finite numbers."""
        self._file.write(_encode(record) + "\n")

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics log, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a record.
    """
    with open(path, encoding="utf-8") as file:
        return [_record(path, number, line) for number, line in enumerate(file, start=1)]


def _kept_lines(path: Path, keep: int) -> list[str]:
    """Lines of iterations 1 to ``keep``, the first ones since the log is in order."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number > keep:
                break
            iteration = _record(path, number, line)["iteration"]
            if iteration != number:
                raise ValueError(
                    f"{path}, line {number}: expected iteration {number}, got {iteration}"
                )
            lines.append(line)
    if len(lines) < keep:
        raise ValueError(f"{path} ends at iteration {len(lines)}, the checkpoint at {keep}")
    return lines


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not a JSON record ({error})") from error
    if not isinstance(record, dict) or "iteration" not in record:
        raise ValueError(f"{path}, line {number}: not a record of an iteration")
    return record
