"""Decoded data sets on disk: one .npz a data set, named by a digest of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder given, else ``$FASTMETA_CACHE``, else ``~/.cache/fastmeta``."""
    chosen = cache or os.environ.get("FASTMETA_CACHE") or Path.home() / ".cache" / "fastmeta"
    return Path(chosen)


def fingerprint(files: Sequence[Path], root: Path) -> list[list[object]]:
    """Name below ``root``, size and time of change of each file, for the key of :func:`cached`."""
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def cached(
    name: str,
    key: Mapping[str, object],
    build: Callable[[], Arrays],
    cache: str | os.PathLike[str] | None = None,
) -> Arrays:
    """The arrays that ``build()`` returns, kept in the cache folder under ``name`` and ``key``.

    Args:
        name: data set name, the readable part of the file name.
        key: everything the arrays depend on, as JSON values; another key is another file.
        build: makes the arrays; called only where the cache does not hold them.
        cache: folder, see :func:`cache_folder`.

    A damaged file is rebuilt and an unwritable folder goes unused, each with a warning.
    Files are complete or absent, whoever else writes the same one.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder(cache) / f"{name}-{digest[:24]}.npz"
    arrays = _load(path)
    if arrays is None:
        arrays = build()
        _save(path, arrays)
    return arrays


def _load(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz archive")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever is wrong with the copy, the original is still there
        warnings.warn(
            f"rebuilding the damaged cache file {path} ({type(error).__name__}: {error})",
            stacklevel=4,
        )
        return None


def _save(path: Path, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"not cached, cannot write {path}: {error}", stacklevel=4)
