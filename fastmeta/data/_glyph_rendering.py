"""Choice of the characters that make good classes, and their rendering as images.

Imports matplotlib and pillow, which are optional: ``glyphs.py`` imports this module on first use.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# In order of preference: the first face that has a character decides which others look alike.
_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No", "Sm", "Sc", "So", "Po"}
# Copies of other characters in another style, position or size.
_RESTYLED = ("<font>", "<super>", "<sub>", "<noBreak>")
# Box drawing and blocks, Braille, tiles and cards: they differ by position or by fine detail.
_UNSUITABLE = ((0x2500, 0x259F), (0x2800, 0x28FF), (0x1F000, 0x1F0FF))

_EM = 3  # pixels rendered per pixel of the final image, before the affine map
_OVERSAMPLE = 2  # the same after the affine map
_EXTENT = 0.64  # longer side of a glyph as a fraction of the image, before jitter
_SMALLEST = 0.3  # least longer side of a glyph, in em
_ELONGATED = 3.0  # greatest ratio of its sides
_ALIKE = 0.93  # cosine similarity above which two glyphs count as the same
_THUMBNAIL = 24  # side of the images compared

# Half-ranges of the uniform jitter.
_ROTATION = math.radians(25)
_LOG_SCALE = 0.2  # of both sides alike
_LOG_STRETCH = 0.2  # of width against height
_SHEAR = 0.3
_SHIFT = 0.08  # of the image's side, both ways
_JITTERS = 6


class Face(NamedTuple):
    """A font at one size, and the code points that it contributes."""

    font: ImageFont.FreeTypeFont
    characters: frozenset[int]

    def at(self, size: int) -> Face:
        """The same face at the resolution that images of ``size`` pixels need."""
        return self._replace(font=self.font.font_variant(size=_EM * size))


def font_files() -> list[Path]:
    """Font files in order of preference; FileNotFoundError if one is missing."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [folder / f"{face}.ttf" for face in _FACES]
    missing = [font.name for font in fonts if not font.is_file()]
    if missing:
        raise FileNotFoundError(f"expected the fonts {', '.join(missing)} in {folder}")
    return fonts


@functools.cache
def load_faces() -> list[Face]:
    """All fonts at one size, which decides the characters for images of every size."""
    layout = ImageFont.Layout.BASIC  # the other layout engine is not installed everywhere
    fonts = [ImageFont.truetype(str(f), _EM * 28, layout_engine=layout) for f in font_files()]
    return [Face(font, frozenset(_good_characters(font))) for font in fonts]


@functools.cache
def distinct_characters() -> list[int]:
    """Code points in order; of characters that look alike only the first."""
    faces = load_faces()
    codes = sorted(frozenset().union(*(face.characters for face in faces)))
    thumbnails = np.stack([_thumbnail(faces, code) for code in codes]).astype(np.float32)
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    alike = thumbnails @ thumbnails.T > _ALIKE
    kept = np.zeros(len(codes), dtype=bool)
    for i, row in enumerate(alike):
        kept[i] = not (row[:i] & kept[:i]).any()
    return [code for code, keep in zip(codes, kept, strict=True) if keep]


def draw_character(
    faces: list[Face], code: int, size: int, examples: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw images uint8 [examples, size, size], each in a random face and with random jitter."""
    glyphs = [_cut_out(face.font, code) for face in faces if code in face.characters]
    choices = rng.integers(len(glyphs), size=examples)
    jitter = rng.uniform(-1, 1, size=(examples, _JITTERS))
    return np.stack(
        [_place(glyphs[i], size, draw) for i, draw in zip(choices, jitter, strict=True)]
    )


def _good_characters(font: ImageFont.FreeTypeFont) -> Iterator[int]:
    """Code points of the font that can be classes, by category and by proportions."""
    for code in FT2Font(str(font.path)).get_charmap():
        if _is_suitable(chr(code)):
            ink = _drawn(font, code).getbbox()
            if ink is not None and _is_well_proportioned(ink, font.size):
                yield code


def _is_well_proportioned(ink: tuple[int, int, int, int], em: float) -> bool:
    left, top, right, bottom = ink
    shorter, longer = sorted((right - left, bottom - top))
    return longer >= _SMALLEST * em and longer <= _ELONGATED * shorter


def _is_suitable(character: str) -> bool:
    return (
        unicodedata.category(character) in _CATEGORIES
        and not unicodedata.decomposition(character).startswith(_RESTYLED)
        and not any(low <= ord(character) <= high for low, high in _UNSUITABLE)
    )


def _drawn(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """The character in grey levels, white on black, with at least one pixel of margin."""
    left, top, right, bottom = font.getbbox(chr(code))
    image = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), chr(code), fill=255, font=font)
    return image


def _cut_out(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """The character with exactly one pixel of margin around its ink."""
    image = _drawn(font, code)
    left, top, right, bottom = image.getbbox() or (0, 0, *image.size)
    return image.crop((left - 1, top - 1, right + 1, bottom + 1))


def _thumbnail(faces: list[Face], code: int) -> np.ndarray:
    """The character in the first face that has it, without jitter, flattened."""
    font = next(face.font for face in faces if code in face.characters)
    return _place(_cut_out(font, code), _THUMBNAIL, np.zeros(_JITTERS)).ravel()


def _place(glyph: Image.Image, size: int, jitter: np.ndarray) -> np.ndarray:
    """Place the glyph in the middle of an image, and jitter it by six numbers in [-1, 1].

    Returns uint8 [size, size]. Six zeros mean no jitter.
    """
    rotation, scale, stretch, shear, shift_x, shift_y = jitter.tolist()
    canvas = _OVERSAMPLE * size
    fit = _EXTENT * canvas / max(glyph.size) * math.exp(_LOG_SCALE * scale)
    width = fit * math.exp(_LOG_STRETCH * stretch)
    height = fit * math.exp(-_LOG_STRETCH * stretch)
    cos, sin = math.cos(_ROTATION * rotation), math.sin(_ROTATION * rotation)
    lean = _SHEAR * shear
    # Glyph to image is rotation @ [[width, lean * height], [0, height]]; PIL wants the inverse.
    a, b = (cos + lean * sin) / width, (sin - lean * cos) / width
    d, e = -sin / height, cos / height
    x = canvas * (0.5 + _SHIFT * shift_x)
    y = canvas * (0.5 + _SHIFT * shift_y)
    matrix = (a, b, glyph.width / 2 - a * x - b * y, d, e, glyph.height / 2 - d * x - e * y)
    moved = glyph.transform(
        (canvas, canvas), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(moved.reduce(_OVERSAMPLE))
