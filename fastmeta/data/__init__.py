"""Few-shot data: whole episodes as [T, ...] tensors, reproducible from a seed on every device."""

from __future__ import annotations

from .episodes import Episode, Episodes, Source
from .glyphs import Glyphs
from .image_folder import ImageFolder
from .images import ClassImages
from .omniglot import Omniglot
from .sinusoid import Sinusoid
from .specs import from_spec

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
