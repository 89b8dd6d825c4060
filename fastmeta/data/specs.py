"""Sources by name, for the command line."""

from __future__ import annotations

import os
from pathlib import Path

from ._checks import check_choice
from .episodes import Source
from .glyphs import Glyphs
from .omniglot import Omniglot
from .sinusoid import Sinusoid

_KNOWN = ("omniglot:PATH", "glyphs", "sinusoid")
_OMNIGLOT_SPLITS = {
    ("official", "train"): "background",
    ("official", "evaluation"): "evaluation",
    ("paper", "train"): "train",
    ("paper", "evaluation"): "test",
}
_GLYPH_SPLITS = {"train": "train", "evaluation": "test"}


def from_spec(
    spec: str,
    split: str = "train",
    protocol: str = "official",
    *,
    cache: str | os.PathLike[str] | None = None,
) -> Source:
    """The source that a short text names.

    Args:
        spec: "omniglot:PATH" with the folder of the data set, "glyphs", or "sinusoid".
        split: "train" or "evaluation". Sinusoid tasks are the same in both.
        protocol: how Omniglot is split. "official": background for training, evaluation for
            evaluation; "paper": the 1028 and the 423 characters of the paper-sized split.
        cache: cache folder of Omniglot and Glyphs; None: their default.

    Raises:
        ValueError: an unknown spec, split or protocol; and whatever the source itself raises.

    Example::

        >>> from fastmeta.data import from_spec
        >>> source = from_spec("sinusoid")
    """
    check_choice("split", split, _GLYPH_SPLITS)
    check_choice("protocol", protocol, ("official", "paper"))
    name, _, argument = spec.partition(":")
    if name == "omniglot" and argument:
        return Omniglot(Path(argument).expanduser(), _OMNIGLOT_SPLITS[protocol, split], cache=cache)
    if spec == "glyphs":
        return Glyphs(_GLYPH_SPLITS[split], cache=cache)
    if spec == "sinusoid":
        return Sinusoid()
    raise ValueError(f"spec: expected one of {', '.join(_KNOWN)}, got {spec!r}")
