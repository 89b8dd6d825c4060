"""The command line: ``python -m fastmeta train|eval|compare|heads|info|demo``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmeta import distributed
from fastmeta.cli import compare, eval, heads, train
from fastmeta.cli.options import add_command, check_one_process
from fastmeta.training.allocator import keep_freed_memory

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``python -m fastmeta``; ``None``: the words of this process.

    Returns:
        The exit status. 0: done. 2: an error of the user, told in one line on stderr.
        128 + the number of a signal: SIGINT or SIGTERM ended the training early, or the reader
        of the output has gone (SIGPIPE).
    """
    given = vars(build_parser().parse_args(arguments))
    keep_freed_memory()
    command, debug = given.pop("command"), given.pop("debug")
    try:
        status: int = command(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # A reader such as `head` has gone: flush the rest of the output into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"{_speaker()}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastmeta: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; the option ``command`` is the function that runs the chosen one."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmeta", description="Fast meta-learning for PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, eval, compare, heads):
        module.add_parser(commands)
    summary = "print what a bug report needs: versions, build, machine, backends"
    add_command(commands, "info", _info, summary)
    summary = "meta-train two learners and compare the speed of the ops, in two minutes"
    demo = add_command(commands, "demo", _demo, summary)
    demo.add_argument("--out", metavar="DIR", required=True, help="folder of runs and picture")
    seconds = "training time of each learner (default: 30)"
    demo.add_argument("--seconds", type=float, metavar="X", help=seconds)
    return parser


def _info(_: dict[str, Any]) -> int:
    from fastmeta.cli.info import report

    print(report())
    return 0


def _demo(given: dict[str, Any]) -> int:
    from fastmeta.cli.demo import demo

    check_one_process("demo")
    demo(Path(given.pop("out")), **given)
    return 0


def _speaker() -> str:
    """Name before an error: with the rank if the program is one of several processes."""
    return f"fastmeta, rank {os.environ['RANK']}" if distributed.launched() else "fastmeta"


def _one_line(error: BaseException) -> str:
    """Message without line breaks; for a missing module, with the command that installs it."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and "pip install" not in message:
        message += "; pip install 'fastmeta[train]'"
    return message or type(error).__name__
