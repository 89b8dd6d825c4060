"""The log of a run: one JSON line per iteration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastmeta.training.files import write_atomically

_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make an encoder each time


class MetricsLog:
    """The metrics of a run as JSON lines: one line an iteration, each iteration once.

    A killed run may leave lines behind its last checkpoint, and a torn one at the end. Opening the
    log drops them: it keeps the iterations up to ``keep``, which a resumed run goes on from.

    Args:
        path: the file.
        keep: the last iteration to keep; 0 starts an empty log.

    Raises:
        OSError: the file cannot be written, or is absent although ``keep`` is not 0.
        ValueError: it does not hold the iterations 1 to ``keep``, a whole line each.

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
        # Line buffering hands every record to the system as one write.
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it has an ``iteration``, and its numbers are finite."""
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
    """The lines of iterations 1 to ``keep``: the log is in order, so they are the first ones."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number > keep:
                break
            if _record(path, number, line)["iteration"] != number:
                raise ValueError(f"{path}, line {number}: this is not iteration {number}")
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
