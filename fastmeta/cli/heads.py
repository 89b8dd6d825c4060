"""Command ``heads``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmeta.cli.options import add_command, check_one_process, set_threads

_SUMMARY = "score heads on stored features of a frozen network"


def add_parser(commands: Any) -> None:
    """Add the parser of ``heads``."""
    parser = add_command(commands, "heads", run, _SUMMARY)
    file = "features and labels: .npz, .pt or .safetensors with the entries x and y"
    parser.add_argument("--features", metavar="FILE", required=True, help=file)
    parser.add_argument("--ways", type=int, metavar="N", help="classes per task (default: 5)")
    shots = "support examples per class, a column each (default: 1 5)"
    parser.add_argument("--shots", type=int, nargs="+", metavar="N", help=shots)
    queries = "query examples per class (default: 15)"
    parser.add_argument("--queries", type=int, metavar="N", help=queries)
    parser.add_argument("--tasks", type=int, metavar="N", help="tasks (default: 10000)")
    names = "heads to score, such as nearest ridge tim (default: all)"
    parser.add_argument("--heads", nargs="+", metavar="HEAD", help=names)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the tasks (default: 0)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--out", metavar="FILE", help="also write the table to this file")


def run(given: dict[str, Any]) -> int:
    """Score the heads and print the table."""
    from fastmeta.data import Features
    from fastmeta.training.head_scores import score_heads

    check_one_process("heads")
    set_threads(given)
    source = Features.load(given.pop("features"))
    if "out" in given:
        given["out"] = Path(given["out"])
    if "heads" in given:
        given["names"] = given.pop("heads")
    print(score_heads(source, **given).table(), end="")
    return 0
