"""Few-shot episodes as tensors [T, ...], reproducible from a seed on every device."""

from __future__ import annotations

from fastmeta.data.episode import Episode, Origin, Source
from fastmeta.data.episodes import Episodes
from fastmeta.data.features import Features
from fastmeta.data.glyphs import Glyphs
from fastmeta.data.image_folder import ImageFolder
from fastmeta.data.images import ClassImages
from fastmeta.data.labelled import ClassDataset, ClassTensors
from fastmeta.data.omniglot import Omniglot
from fastmeta.data.sinusoid import Sinusoid
from fastmeta.data.specs import from_spec

__all__ = [
    "ClassDataset",
    "ClassImages",
    "ClassTensors",
    "Episode",
    "Episodes",
    "Features",
    "Glyphs",
    "ImageFolder",
    "Omniglot",
    "Origin",
    "Sinusoid",
    "Source",
    "from_spec",
]
