"""The command line that makes a training run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from fastmeta.training.config import TrainConfig


def train_command(config: TrainConfig) -> str:
    """The command that trains what ``config`` says, with the options that are not as usual.

    Args:
        config: the options of the run.

    Returns:
        A line for a POSIX shell; ``python -m fastmeta train`` makes the same config of it.

    Example:
        >>> train_command(TrainConfig("maml", "glyphs", "runs/maml", steps=3, first_order=True))
        'python -m fastmeta train maml --data glyphs --steps 3 --first-order --out runs/maml'
    """
    options = _needed(config)
    words = ["python", "-m", "fastmeta", "train", options.pop("algorithm")]
    options["out"] = options.pop("out")  # to the end
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _needed(config: TrainConfig) -> dict[str, Any]:
    """The options without which it would be another config: usual values depend on others."""
    options = dataclasses.asdict(config)
    for name in list(options):
        fewer = {other: value for other, value in options.items() if other != name}
        if _makes(fewer, config):
            options = fewer
    return options


def _makes(options: dict[str, Any], config: TrainConfig) -> bool:
    try:
        return TrainConfig(**options) == config
    except (TypeError, ValueError):
        return False
