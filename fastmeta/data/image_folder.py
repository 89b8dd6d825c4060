"""Your own images in folders, one folder per class."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from fastmeta.core.checks import check_count
from fastmeta.core.optional import require
from fastmeta.data._cache import Arrays, cached, fingerprint
from fastmeta.data.images import ClassImages

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_DEEP = ("I", "F")  # modes with more than 8 bits per channel
_FORMAT = 1


class ImageFolder(ClassImages):
    """Classes of images, one for each folder with images below ``root``: ``root/cat/001.jpg``.

    Args:
        root: folder that holds the folders of the classes, at any depth. It is never written to.
        size: height and width in pixels; the middle square of each image is resized to it with
            antialiasing. None: the images keep their size, which must be the same for all.
        cache: folder for the decoded images; None: ``$FASTMETA_CACHE``, or ``~/.cache/fastmeta``.

    The images are uint8 [C, E, channels, H, W], turned upright by their EXIF orientation. They have
    one channel if none of them has colour, else three. ``class_names`` are the sorted paths of the
    folders below ``root``. E is the number of images in the smallest class; of larger classes the
    first E by name are used. Files whose names begin with a dot are ignored.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: no folder below it holds images; an image cannot be decoded; images differ in
            size and no size is given; or the size is not positive.

    Warns:
        UserWarning: some images are not used, because classes differ in their number.

    Example::

        source = fastmeta.data.ImageFolder("birds/train", size=84)
        source.images.shape                                  # [100, 60, 3, 84, 84]
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if size is not None:
            size = check_count("size", size, least=1)
        root = Path(root)
        classes = _equal(_by_class(root), root)
        files = [file for images in classes.values() for file in images]
        key = {"format": _FORMAT, "size": size, "files": fingerprint(files, root)}
        arrays = cached("images", key, lambda: _decode(files, root, size), cache)
        images = torch.from_numpy(arrays["images"])
        super().__init__(images.unflatten(0, (len(classes), -1)), list(classes))


def _by_class(root: Path) -> dict[str, list[Path]]:
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    classes: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(root.rglob("*")):
        is_image = file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
        if is_image and file.parent != root and file.is_file():
            classes[file.parent.relative_to(root).as_posix()].append(file)
    if not classes:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"root: expected {root} to hold a folder of images for each class; found {found}"
        )
    return {name: classes[name] for name in sorted(classes)}


def _equal(classes: dict[str, list[Path]], root: Path) -> dict[str, list[Path]]:
    """Keep the same number of images of each class, the first ones."""
    smallest = min(classes, key=lambda name: len(classes[name]))
    each = len(classes[smallest])
    if any(len(images) != each for images in classes.values()):
        warnings.warn(
            f"the first {each} images of every class in {root} are used, {smallest} has no more",
            stacklevel=3,
        )
    return {name: images[:each] for name, images in classes.items()}


def _decode(files: list[Path], root: Path, size: int | None) -> Arrays:
    require("PIL", "reading images")
    first = _pixels(files[0], size)
    height, width, _ = first.shape
    images = np.empty((len(files), 3, height, width), dtype=np.uint8)
    has_colour = False
    for row, file in zip(images, files, strict=True):
        pixels = _pixels(file, size)
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"size: give one to resize to, as the images in {root} differ: "
                f"{_described(files[0], first, root)}, {_described(file, pixels, root)}"
            )
        row[:] = pixels.transpose(2, 0, 1)  # broadcasts a grey image to three channels
        has_colour |= pixels.shape[2] == 3
    return {"images": images if has_colour else images[:, :1]}


def _described(file: Path, image: np.ndarray, root: Path) -> str:
    return f"{file.relative_to(root).as_posix()} is {image.shape[1]} x {image.shape[0]}"


def _pixels(file: Path, size: int | None) -> np.ndarray:
    """Read an image: uint8 [H, W, 3], or [H, W, 1] if it has no colour."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(_DEEP):
                raise ValueError(f"expected 8 bits per channel, got mode {opened.mode}")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"root: cannot decode {file}: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    grey = pixels[:, :, :1]
    return grey if (pixels == grey).all() else pixels
