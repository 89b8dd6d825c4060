"""Command-line options, generated from the fields of ``TrainConfig``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Container, Sequence
from typing import Any

import torch

from fastmeta import distributed
from fastmeta.core.checks import check_count
from fastmeta.training.config import TrainConfig, option_types
from fastmeta.training.learner_options import (
    LEARNER_OPTIONS,
    METRIC_LEARNERS,
    describe_default,
)


def add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """Add the parser of a command; ``run`` gets the options that were given, and only those."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        argument_default=argparse.SUPPRESS,  # defaults stand in TrainConfig
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    parser.add_argument("--debug", action="store_true", default=False, help="show tracebacks")
    return parser


def add_options(parser: argparse.ArgumentParser, what: str, without: Container[str] = ()) -> None:
    """Add the options of a run or comparison: its folder, and the fields of TrainConfig.

    Args:
        parser: parser of the command.
        what: content of the folder, ``"run"`` or ``"comparison"``.
        without: names of the fields to leave out.
    """
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", required=True, help=f"folder of the {what}")
    run.add_argument("--resume", action="store_true", help=f"continue the {what} in DIR")
    run.add_argument("--overwrite", action="store_true", help=f"replace the {what} in DIR")
    groups, types = {"run": run}, option_types()
    for option in dataclasses.fields(TrainConfig):
        if option.name in ("algorithm", "out") or option.name in without:
            continue
        title = option.metadata["group"]
        group = groups.get(title) or parser.add_argument_group(title)
        groups[title] = group
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, **_form(types[option.name], option), help=option_help(option))


def _form(kind: type, option: dataclasses.Field[Any]) -> dict[str, Any]:
    if kind is bool:
        return {"action": "store_true"}
    if choices := option.metadata.get("choices"):
        return {"choices": choices}
    if kind == Sequence[str]:
        return {"nargs": "+", "metavar": "PATTERN"}
    metavar = {int: "N", float: "X"}.get(kind, option.name.upper())
    return {"type": kind, "metavar": metavar}


def option_help(option: dataclasses.Field[Any]) -> str:
    """Describe an option: its learners if only some have it, its meaning, and its default."""
    learners = [name for name, own in LEARNER_OPTIONS.items() if option.name in own]
    # The groups say it of options that all of their learners have.
    others = [name for name in LEARNER_OPTIONS if name not in METRIC_LEARNERS]
    several = learners not in ([], list(METRIC_LEARNERS), others)
    owners = f"{', '.join(learners)}: " if several else ""
    default = describe_default(option.name)
    if isinstance(option.default, (int, str)) and option.default is not False:
        default = str(option.default)
    said = f" (default: {default})" if default else ""
    return f"{owners}{option.metadata['help']}{said}"


def check_data(given: dict[str, Any]) -> None:
    """Raise ValueError if the data are not given."""
    if "data" not in given:
        raise ValueError("data: give --data omniglot:PATH, images:PATH, glyphs or sinusoid")


def check_one_process(command: str) -> None:
    """Raise ValueError if torchrun started several processes."""
    if distributed.launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError(f"{command} runs in one process, without torchrun; train takes several")


def set_threads(given: dict[str, Any]) -> None:
    """Take ``threads`` out of the options and give PyTorch as many."""
    if "threads" in given:
        torch.set_num_threads(check_count("threads", given.pop("threads"), least=1))
