"""Stored features of a frozen network, as a source of episodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmeta.core.optional import require
from fastmeta.data.labelled import ClassTensors

SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")
_NAMES = {"x": ("x", "features"), "y": ("y", "labels")}


class Features(ClassTensors):
    """Feature vectors and their labels, a source for :class:`Episodes`.

    Args:
        x: floating-point tensor or array ``[M, D]``, a row an example. It keeps its dtype.
        y: M labels, integers or strings, in any order.

    Raises:
        TypeError: ``x`` is not floating point, or the labels are not integers or strings.
        ValueError: ``x`` is not ``[M, D]``, it holds NaN or infinities, or the number of labels is
            not M.

    Example:
        >>> import torch
        >>> from fastmeta.data import Episodes, Features
        >>> source = Features(torch.randn(100, 64), torch.arange(100) % 7)
        >>> Episodes(source, ways=5, shots=1, queries=4, tasks=3)[0].query_x.shape
        torch.Size([3, 20, 64])
    """

    def __init__(self, x: Tensor | np.ndarray, y: Any) -> None:
        super().__init__(x, y)
        if not self.features.is_floating_point():
            raise TypeError(f"x: expected floating-point features, got {self.features.dtype}")
        if self.features.dim() != 2:
            raise ValueError(
                f"x: expected shape [M, D], a row an example, got {list(self.features.shape)}"
            )
        finite = self.features.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"x: expected finite features, row {int(finite.int().argmin())} is not"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Features:
        """Read a file with the entries ``x`` (or ``features``) and ``y`` (or ``labels``).

        Args:
            path: ``.npz`` of NumPy; ``.pt`` or ``.pth`` of ``torch.save``, a dict of tensors; or
                ``.safetensors``. No file runs code: pickled objects are refused.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the ending is unknown, the file is damaged, or an entry is missing.
            ImportError: safetensors is not installed.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from fastmeta.data import Features
            >>> path = tempfile.mkdtemp() + "/features.npz"
            >>> np.savez(path, x=np.ones((4, 2), dtype=np.float32), y=["a", "b", "a", "b"])
            >>> Features.load(path).class_names
            ['a', 'b']
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"features: expected a file {', '.join(SUFFIXES)}, got {path}")
        if not path.is_file():
            raise FileNotFoundError(f"features: there is no file {path}")
        entries = _entries(path)
        x, y = (_entry(entries, kind, path) for kind in ("x", "y"))
        return cls(x, y)


def _entries(path: Path) -> Mapping[str, Any]:
    """The arrays or tensors of a file, by name."""
    loader = None
    if path.suffix == ".safetensors":
        loader = require("safetensors.torch", "reading .safetensors", "safetensors")
    try:
        if loader is not None:
            found: Any = loader.load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"features: cannot read {path} ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"features: expected {path} to hold a dict with x and y, got {type(found).__name__}"
        )
    return found


def _entry(entries: Mapping[str, Any], kind: str, path: Path) -> Any:
    names = [name for name in _NAMES[kind] if name in entries]
    if len(names) != 1:
        expected = " or ".join(_NAMES[kind])
        raise ValueError(
            f"features: expected one entry {expected} in {path}, got "
            f"{', '.join(map(str, entries)) or 'none'}"
        )
    return entries[names[0]]
