"""Command line of a training run."""

from __future__ import annotations

import dataclasses
import shlex

from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import resolved_defaults


def train_command(config: TrainConfig) -> str:
    """Command that trains with the options of ``config``, written without those at their default.

    Args:
        config: the options of the run.

    Returns:
        A line for a POSIX shell; ``python -m fastmeta train`` makes the same config of it.

    Example:
        >>> train_command(TrainConfig("maml", "glyphs", "runs/maml", steps=3, first_order=True))
        'python -m fastmeta train maml --data glyphs --steps 3 --first-order --out runs/maml'
    """
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    defaults |= resolved_defaults(vars(config))
    words = ["python", "-m", "fastmeta", "train", config.algorithm]
    for name, value in vars(config).items():
        if value != defaults[name] and name not in ("algorithm", "out"):
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [str(value)]
            words += [flag] if value is True else [flag, *values]
    return shlex.join([*words, "--out", config.out])
