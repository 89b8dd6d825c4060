"""Your own images in folders, one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastmeta.core.checks import check_count
from fastmeta.core.optional import require
from fastmeta.data._cache import Arrays, cached, fingerprint
from fastmeta.data.class_examples import warn_of_small
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
        min_images: classes with fewer images are left out, and a warning names them.

    The images are uint8 [M, channels, H, W] in ``flat``, class by class, and [C, E, channels, H, W]
    in ``images`` if every class has E. They are turned upright by their EXIF orientation. They have
    one channel if none of them has colour, else three. ``class_names`` are the sorted paths of the
    folders below ``root``. Links are followed. Files and folders whose names begin with a dot are
    ignored.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: no folder below it holds (enough) images; an image cannot be decoded; images
            differ in size and no size is given; or a number is not positive.

    Warns:
        UserWarning: folders have no images, or fewer than ``min_images``.

    Example::

        source = fastmeta.data.ImageFolder("birds/train", size=84, min_images=20)
        source.flat.shape                                    # [5994, 3, 84, 84]
        episodes = fastmeta.data.Episodes(source, ways=5, shots=1, queries=15, tasks=4)
        episodes.origin(0).support[0]                        # files of the first task's support
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        min_images: int = 1,
    ) -> None:
        if size is not None:
            size = check_count("size", size, least=1)
        min_images = check_count("min_images", min_images, least=1)
        root = Path(root)
        classes = _large(_by_class(root), min_images, root)
        files = [file for images in classes.values() for file in images]
        key = {"format": _FORMAT, "size": size, "files": fingerprint(files, root)}
        arrays = cached("images", key, lambda: _decode(files, root, size), cache)
        counts = [len(images) for images in classes.values()]
        super().__init__(torch.from_numpy(arrays["images"]), list(classes), counts)
        self._files = [file.relative_to(root).as_posix() for file in files]

    @property
    def files(self) -> list[str]:
        """File of each image of ``flat``, as a path below ``root``."""
        return list(self._files or [])


def _by_class(root: Path) -> dict[str, list[Path]]:
    """Images of each folder that holds some, and of each that holds neither images nor folders."""
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    classes: dict[str, list[Path]] = {}
    for folder, folders, names in _walk(root):
        images = [folder / name for name in sorted(names) if _is_image(name)]
        for image in images:
            if not image.exists():
                raise ValueError(f"root: {image} is a link to nothing")
        if folder != root and (images or not folders):
            classes[folder.relative_to(root).as_posix()] = images
    return {name: classes[name] for name in sorted(classes)}


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Like ``os.walk``, through links and without what is hidden; a link to an ancestor ends it."""
    for place, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(place)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not f"{here}/".startswith(os.path.realpath(os.path.join(place, name)) + "/")
        ]
        yield Path(place), folders, files


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _SUFFIXES and not name.startswith(".")


def _large(classes: dict[str, list[Path]], least: int, root: Path) -> dict[str, list[Path]]:
    """Classes with ``least`` images; a warning names the others."""
    small = {name: len(images) for name, images in classes.items() if len(images) < least}
    if len(small) == len(classes):
        if any(classes.values()):
            most = max(map(len, classes.values()))
            raise ValueError(
                f"root: expected a folder below {root} with at least {least} images, the largest "
                f"has {most}"
            )
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"root: expected {root} to hold a folder of images for each class; found {found}"
        )
    warn_of_small(small, len(classes), least, "images")
    return {name: images for name, images in classes.items() if name not in small}


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
