"""Cache of decoded data sets: one .npz file each, named by a digest of all that it depends on."""

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
    """Cache folder: ``cache`` if given, else ``$FASTMETA_CACHE``, else ``~/.cache/fastmeta``."""
    chosen = cache or os.environ.get("FASTMETA_CACHE") or Path.home() / ".cache" / "fastmeta"
    return Path(chosen)


def fingerprint(files: Sequence[Path], root: Path) -> list[list[object]]:
    """Name below ``root``, size and modification time of each file, for a key of the cache."""
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def cached(
    name: str,
    key: Mapping[str, object],
    build: Callable[[], Arrays],
    cache: str | os.PathLike[str] | None = None,
) -> Arrays:
    """Arrays from the cache, or from ``build()`` on a cache miss.

    Args:
        name: name of the data set, the readable part of the file name.
        key: everything that the arrays depend on, as JSON values; each key has its own file.
        build: makes the arrays; called only on a cache miss.
        cache: folder, see :func:`cache_folder`.

    A damaged file is rebuilt, and an unwritable folder is not used, each with a warning. Files are
    complete or absent, also if several processes write the same one.
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
    except Exception as error:  # whatever is wrong with the copy, the source is intact
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
