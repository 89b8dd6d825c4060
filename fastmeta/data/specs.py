"""Sources of episodes by a short text, as in ``--data``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastmeta.core.checks import check_choice
from fastmeta.data.episode import Source
from fastmeta.data.glyphs import Glyphs
from fastmeta.data.image_folder import ImageFolder
from fastmeta.data.omniglot import Omniglot
from fastmeta.data.sinusoid import Sinusoid

_KNOWN = ("omniglot:PATH", "images:PATH", "glyphs", "sinusoid")
_OMNIGLOT_SPLITS = {
    ("official", "train"): "background",
    ("official", "evaluation"): "evaluation",
    ("paper", "train"): "train",
    ("paper", "evaluation"): "test",
}
_GLYPH_SPLITS = {"train": "train", "evaluation": "test"}
_IMAGE_FOLDERS = {"train": "train", "validation": "val", "evaluation": "test"}


def from_spec(
    spec: str,
    split: str = "train",
    protocol: str = "official",
    *,
    cache: str | os.PathLike[str] | None = None,
    min_images: int = 1,
) -> Source:
    """Make the source that a short text names.

    Args:
        spec: "omniglot:PATH" with the folder of the data set; "images:PATH", see
            :func:`image_folder`; "glyphs"; or "sinusoid".
        split: "train" or "evaluation". Sinusoid tasks do not depend on it.
        protocol: split of Omniglot. "official": the published parts, background for training and
            evaluation for evaluation; "paper": 1028 and 423 characters.
        cache: cache folder of images; None: the default of the source.
        min_images: folders of images with fewer are left out, and a warning names them.

    Raises:
        ValueError: the spec, split or protocol is unknown. Errors of the source pass through.

    Example::

        >>> from fastmeta.data import from_spec
        >>> source = from_spec("sinusoid")
    """
    check_choice("split", split, _GLYPH_SPLITS)
    check_choice("protocol", protocol, ("official", "paper"))
    name, _, argument = spec.partition(":")
    if name == "omniglot" and argument:
        return Omniglot(Path(argument).expanduser(), _OMNIGLOT_SPLITS[protocol, split], cache=cache)
    if name == "images" and argument:
        return image_folder(argument, split, cache=cache, min_images=min_images)
    if spec == "glyphs":
        return Glyphs(_GLYPH_SPLITS[split], cache=cache)
    if spec == "sinusoid":
        return Sinusoid()
    raise ValueError(f"spec: expected one of {', '.join(_KNOWN)}, got {spec!r}")


def image_folder(
    argument: str,
    split: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    min_images: int = 1,
) -> ImageFolder:
    """Classes of a split of your own images: of the folder ``train``, ``val`` or ``test``.

    Args:
        argument: "PATH", or "PATH@SIZE" to resize the images to SIZE pixels in height and width.
        split: "train", "validation" (the folder ``val``) or "evaluation" (``test``).
        cache: cache folder of the images; None: the default.
        min_images: classes with fewer images are left out, and a warning names them.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: the images do not make an :class:`ImageFolder`.

    Example::

        source = image_folder("birds@84", "train")           # birds/train/CLASS/*.jpg
    """
    root, size = _place(argument, split)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data: expected {root} to hold a folder of images for each class; there is no {root}"
        )
    return ImageFolder(root, size, cache, min_images)


def has_image_folder(argument: str, split: str) -> bool:
    """Whether the split has a folder."""
    return _place(argument, split)[0].is_dir()


def _place(argument: str, split: str) -> tuple[Path, int | None]:
    path, size = argument, None
    if match := re.fullmatch(r"(.+)@(\d+)", argument):
        path, size = match[1], int(match[2])
    return Path(path).expanduser() / _IMAGE_FOLDERS[split], size
