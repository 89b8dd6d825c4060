"""Characters of many scripts, rendered with random jitter from the fonts of matplotlib."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import torch

from fastmeta.core.checks import check_choice, check_count
from fastmeta.core.optional import require
from fastmeta.data._cache import Arrays, cached
from fastmeta.data.images import ClassImages, stable_fraction

# Each split takes the families of characters whose hash falls between its two bounds.
_SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
_FORMAT = 1


class Glyphs(ClassImages):
    """Characters of many scripts: thousands of classes without a download.

    Scripts such as Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Georgian, Canadian syllabics,
    Tifinagh and N'Ko, and symbols, from the fonts DejaVu and STIX that matplotlib ships. Each
    example is in a random one of up to 16 faces that have the character (sans, serif, mono; bold;
    slanted). It is fitted to the image, then rotated (by up to 25 degrees), scaled, stretched,
    sheared and shifted at random.

    Not included are blank, tiny and elongated glyphs, combining marks, restyled copies of other
    characters, and all but one of the characters that look alike.

    Args:
        split: "train", "validation" or "test", about 2400, 350 and 700 characters. The splits are
            disjoint; all accented, positional and capital forms of a letter are in the same one.
        size: height and width in pixels, at least 8.
        examples: E, images per class.
        seed: seed of the faces and the jitter, not of the split; 0 to 2**64 - 1.
        cache: folder for the images; None: ``$FASTMETA_CACHE``, or ``~/.cache/fastmeta``.

    The images are uint8 [C, E, 1, size, size] with ink = 255 and paper = 0. ``class_names`` look
    like "U+0416 CYRILLIC CAPITAL LETTER ZHE". The same arguments give the same images if the fonts
    and the versions of FreeType and pillow are the same.

    Raises:
        ImportError: matplotlib or pillow is missing (``pip install fastmeta[train]``).
        FileNotFoundError: the fonts of matplotlib are missing.
        TypeError: a count or the seed is not an integer.
        ValueError: the split is unknown, or a count or the seed is out of range.

    Example::

        source = fastmeta.data.Glyphs("train")
        source.images.shape                                  # [C, 20, 1, 28, 28]
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 28,
        examples: int = 20,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.split = check_choice("split", split, _SPLITS)
        size = check_count("size", size, least=8)
        examples = check_count("examples", examples, least=1)
        seed = check_count("seed", seed, least=0, below=2**64)
        key = {"split": split, "size": size, "examples": examples, "seed": seed, **_versions()}
        arrays = cached(f"glyphs-{split}", key, lambda: _render(split, size, examples, seed), cache)
        super().__init__(torch.from_numpy(arrays["images"]), arrays["names"].tolist())


def _versions() -> dict[str, object]:
    """Fonts and library versions that the images depend on."""
    pillow = require("PIL", "rendering glyphs")
    require("matplotlib", "rendering glyphs")
    from PIL import features

    from fastmeta.data._glyph_rendering import font_files

    return {
        "format": _FORMAT,
        "fonts": [[font.name, font.stat().st_size] for font in font_files()],
        "pillow": [pillow.__version__, features.version("freetype2")],
        "unicode": unicodedata.unidata_version,
    }


def _render(split: str, size: int, examples: int, seed: int) -> Arrays:
    from fastmeta.data._glyph_rendering import distinct_characters, draw_character, load_faces

    faces = [face.at(size) for face in load_faces()]
    codes = [code for code in distinct_characters() if _in_split(code, split)]
    images = np.empty((len(codes), examples, 1, size, size), dtype=np.uint8)
    for of_class, code in zip(images[:, :, 0], codes, strict=True):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, code], dtype=np.uint64)))
        of_class[:] = draw_character(faces, code, size, examples, rng)
    names = [f"U+{code:04X} {unicodedata.name(chr(code), '')}".strip() for code in codes]
    return {"names": np.array(names), "images": images}


def _in_split(code: int, split: str) -> bool:
    """Whether the base letter of ``code`` belongs to the split."""
    letter = unicodedata.normalize("NFKD", chr(code))[0].lower()[0]
    family = unicodedata.name(letter, letter).split(" WITH ")[0]
    low, high = _SPLITS[split]
    return low <= stable_fraction(family, "glyphs") < high
