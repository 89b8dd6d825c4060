"""Few-shot episodes as tensors [T, ...], reproducible from a seed on every device."""

from __future__ import annotations

from fastmeta.data.episodes import Episode, Episodes, Source
from fastmeta.data.glyphs import Glyphs
from fastmeta.data.image_folder import ImageFolder
from fastmeta.data.images import ClassImages
from fastmeta.data.omniglot import Omniglot
from fastmeta.data.sinusoid import Sinusoid
from fastmeta.data.specs import from_spec

__all__ = [
    "ClassImages",
    "Episode",
    "Episodes",
    "Glyphs",
    "ImageFolder",
    "Omniglot",
    "Sinusoid",
    "Source",
    "from_spec",
]
