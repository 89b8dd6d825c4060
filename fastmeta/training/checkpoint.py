"""Files of a training run that survive being killed: checkpoints, and the log of metrics."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = "fastmeta checkpoint 1"
_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make an encoder each time


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` by what ``write`` puts into a file: wholly, or not at all.

    The bytes go to a temporary file beside ``path`` and reach the disk before the name moves, so a
    reader, a crash or a power cut meets the old file or the new one, never a part of one.

    Args:
        path: the file to write; its folder exists.
        write: called once with the open temporary file.

    Raises:
        OSError: the folder cannot be written to. What ``write`` raises passes through. In both
            cases ``path`` is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, lambda file: file.write(b"kept"))
        >>> path.read_bytes()
        b'kept'
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, and dicts and lists of them) atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; every tensor comes back on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no fastmeta checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT}")
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that layers such as dropout draw from on ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_state` took; a generator that was not in use then stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


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


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
