"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file ``path`` by what ``write`` writes: completely, or not at all.

    The bytes reach the disk in a temporary file beside ``path``, which is then renamed. A reader,
    or a restart after a crash or a power cut, finds the old file or the new one, never a part.

    Args:
        path: the file to write; its folder exists.
        write: called once with the open temporary file.

    Raises:
        OSError: the folder cannot be written to. Errors of ``write`` pass through. In both cases
            ``path`` is unchanged.

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


def _sync_folder(folder: Path) -> None:
    """Flush the folder to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
