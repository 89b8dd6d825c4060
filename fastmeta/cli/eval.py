"""Command ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmeta.cli.options import add_command, check_one_process, set_threads
from fastmeta.training.learner_options import METRIC_LEARNERS


def add_parser(commands: Any) -> None:
    """Add the parser of ``eval``."""
    parser = add_command(commands, "eval", run, "score a trained run on evaluation tasks")
    parser.add_argument("out", metavar="DIR", help="folder of the run")
    parser.add_argument("--tasks", type=int, metavar="N", help="evaluation tasks (default: 600)")
    compares = ", ".join(METRIC_LEARNERS)
    ways = f"classes per task; only for {compares}"
    parser.add_argument("--ways", type=int, metavar="N", help=ways)
    parser.add_argument("--shots", type=int, metavar="N", help="support examples per class")
    parser.add_argument("--queries", type=int, metavar="N", help="query examples per class")
    steps = f"inner steps; not for {compares}"
    parser.add_argument("--steps", type=int, metavar="N", help=steps)
    parser.add_argument("--data", metavar="DATA", help="another source of tasks")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the tasks (default: 0)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.epilog = "Options without a default are as in training."


def run(given: dict[str, Any]) -> int:
    """Score the run and print one line."""
    from fastmeta.training.evaluation import evaluate_run

    check_one_process("eval")
    set_threads(given)
    print(evaluate_run(Path(given.pop("out")), **given))
    return 0
