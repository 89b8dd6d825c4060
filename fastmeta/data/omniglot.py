"""Omniglot in its official layout, as folders or as the two zip archives."""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastmeta.core.checks import check_choice, check_count
from fastmeta.core.optional import require
from fastmeta.data._cache import Arrays, cached, fingerprint
from fastmeta.data.images import ClassImages, stable_fraction

_PARTS = {"background": 964, "evaluation": 659}
_PAPER_SPLITS = {"train": (0, 1028), "validation": (1028, 1200), "test": (1200, 1623)}
_TRAINING_SPLITS = ("background", "train")
_LAYOUT = "images_{part}/ALPHABET/characterNN/IIII_JJ.png, as a folder or in images_{part}.zip"
_IMAGE = re.compile(r"images_\w+/([^/]+/character\d+)/\d+_\d+\.png")
_FORMAT = 1


class Omniglot(ClassImages):
    """Handwritten characters of 50 alphabets, 20 drawings of each (Lake et al. 2015, Science 350).

    Args:
        root: folder that holds ``images_background`` and ``images_evaluation``, each as a
            ``.zip``, which is preferred, or as a folder. It is never written to.
        split: "background" (964 characters) or "evaluation" (659), as published; or "train",
            "validation" or "test", 1028, 172 and 423 of all 1623 characters, the sizes of Vinyals
            et al. 2016 and Snell et al. 2017. Their list of characters is not in the data set, so
            these three splits follow a fixed permutation of the sorted names (by SHA-256).
        rotations: make each of the four rotations of a character by 90 degrees a class of its
            own. None: True for "background" and "train", False otherwise.
        size: height and width in pixels; the drawings are resized from 105 with antialiasing.
        cache: folder for the decoded images; None: ``$FASTMETA_CACHE``, or ``~/.cache/fastmeta``.

    The images are uint8 [C, 20, 1, size, size] with ink = 255 and paper = 0. With rotations, C is
    four times the number of characters: first all characters upright, then all turned 90 degrees
    counterclockwise, and so on. ``class_names`` are "Alphabet/character01", and
    "Alphabet/character01@90" if turned.

    Raises:
        FileNotFoundError: ``root``, or the part of the data set that the split needs, is missing.
        ValueError: the split is unknown, the size is not positive, or the files are not laid out
            as published.

    Warns:
        UserWarning: a part does not have the published number of characters.

    Example::

        source = fastmeta.data.Omniglot("data/omniglot", split="background")
        source.images.shape                                  # [3856, 20, 1, 28, 28]
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "background",
        rotations: bool | None = None,
        size: int = 28,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.split = check_choice("split", split, [*_PARTS, *_PAPER_SPLITS])
        size = check_count("size", size, least=1)
        if split in _PARTS:
            names, drawings = _part(Path(root), split, size, cache)
        else:
            names, drawings = _paper_split(Path(root), split, size, cache)
        images = torch.from_numpy(drawings)[:, :, None]
        if rotations is None:
            rotations = split in _TRAINING_SPLITS
        if rotations:
            turns = range(4)
            images = torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in turns])
            names = [f"{name}@{90 * turn}" if turn else name for turn in turns for name in names]
        super().__init__(images, names)


def _paper_split(
    root: Path, split: str, size: int, cache: str | os.PathLike[str] | None
) -> tuple[list[str], np.ndarray]:
    parts = [_part(root, part, size, cache) for part in _PARTS]
    names = [name for part_names, _ in parts for name in part_names]
    total = sum(_PARTS.values())
    if len(set(names)) != total:
        raise ValueError(
            f"split: {split!r} expects the {total} different characters of the whole data set, "
            f"{root} has {len(set(names))}"
        )
    shapes = {drawings.shape[1:] for _, drawings in parts}
    if len(shapes) != 1:
        raise ValueError(f"root: the two parts of {root} differ in drawings a character: {shapes}")
    shuffled = sorted(range(total), key=lambda i: stable_fraction(names[i], "omniglot"))
    chosen = sorted(shuffled[slice(*_PAPER_SPLITS[split])], key=names.__getitem__)
    return [names[i] for i in chosen], np.concatenate([images for _, images in parts])[chosen]


def _part(
    root: Path, part: str, size: int, cache: str | os.PathLike[str] | None
) -> tuple[list[str], np.ndarray]:
    """Names [C] and drawings uint8 [C, E, size, size] of a published part."""
    place = _find(root, part)
    key = {"format": _FORMAT, "size": size, "files": _fingerprint(place)}
    arrays = cached(f"omniglot-{part}", key, lambda: _decode(place, part, size), cache)
    names = arrays["names"].tolist()
    if len(names) != _PARTS[part]:
        warnings.warn(
            f"{place} has {len(names)} characters, the published {part} part has {_PARTS[part]}",
            stacklevel=3,
        )
    return names, arrays["images"]


def _find(root: Path, part: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(
            f"root: {root} is not a folder; expected it to hold {_layout(part)}"
        )
    for place in (root / f"images_{part}.zip", root / f"images_{part}"):
        if place.exists():
            return place
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"root: expected {root} to hold {_layout(part)}; found {found}")


def _layout(part: str) -> str:
    return _LAYOUT.format(part=part)


def _fingerprint(place: Path) -> list[list[object]]:
    """Name, size and modification time of the archive, or of every image in the folder."""
    files = sorted(place.rglob("*.png")) if place.is_dir() else [place]
    return fingerprint(files, place.parent)


@contextmanager
def _open(place: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Paths of all files in a folder or archive, and a function that reads one of them."""
    if place.is_dir():
        root = place.parent
        names = [file.relative_to(root).as_posix() for file in place.rglob("*") if file.is_file()]
        yield names, lambda name: (root / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(place)
    except zipfile.BadZipFile as error:
        raise ValueError(f"root: {place} is not a readable zip archive: {error}") from error
    with archive:
        yield archive.namelist(), archive.read


def _decode(place: Path, part: str, size: int) -> Arrays:
    require("PIL", "reading Omniglot")
    with _open(place) as (files, read):
        characters = _by_character(files, place, part)
        images = [
            [_drawing(read, file, place, size) for file in drawings]
            for drawings in characters.values()
        ]
    return {"names": np.array(list(characters)), "images": np.array(images, dtype=np.uint8)}


def _by_character(files: Sequence[str], place: Path, part: str) -> dict[str, list[str]]:
    """Image files of each character; files and characters are sorted."""
    characters: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        if match := _IMAGE.fullmatch(file):
            characters[match[1]].append(file)
    if not characters:
        found = ", ".join(sorted(files)[:4]) or "no files"
        raise ValueError(f"root: expected {place} to hold {_layout(part)}; found {found}")
    counts = {len(drawings) for drawings in characters.values()}
    if len(counts) != 1:
        few = min(characters, key=lambda name: len(characters[name]))
        raise ValueError(
            f"root: expected equally many drawings of each character in {place}, "
            f"got {len(characters[few])} ({few}) to {max(counts)}"
        )
    return dict(characters)


def _drawing(read: Callable[[str], bytes], file: str, place: Path, size: int) -> np.ndarray:
    """Read a drawing, inverted and resized: uint8 [size, size], ink = 255."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(file))) as image:
            grey = image.convert("L")
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"root: cannot decode {file} in {place}: {error}") from error
    if grey.width != grey.height:
        raise ValueError(
            f"root: expected square drawings, {file} in {place} is {grey.width} x {grey.height}"
        )
    return 255 - np.asarray(grey.resize((size, size), Image.Resampling.LANCZOS))
