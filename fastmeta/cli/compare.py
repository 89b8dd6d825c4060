"""Command ``compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fastmeta.cli.options import (
    add_command,
    add_options,
    check_data,
    check_one_process,
    set_threads,
)
from fastmeta.training.learner_options import ALGORITHMS, OF_SOME_LEARNERS

_SUMMARY = "meta-train learners on the same tasks, score them, draw a table and a picture"

_SET = (
    "option of one learner, such as maml.steps=2, maml.learn_lr=true or maml.adapt=A,B; repeatable"
)


def add_parser(commands: Any) -> None:
    """Add the parser of ``compare``."""
    parser = add_command(commands, "compare", run, _SUMMARY)
    known = f"{', '.join(ALGORITHMS)} (default: all that can learn from the data)"
    parser.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS, metavar="ALGORITHM", help=known
    )
    parser.add_argument("--set", action="append", metavar="ALGORITHM.OPTION=VALUE", help=_SET)
    existing = "compare the runs in these folders, and train nothing"
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help=existing)
    parser.add_argument("--tasks", type=int, metavar="N", help="evaluation tasks (default: 600)")
    add_options(parser, "comparison", without=OF_SOME_LEARNERS)


def run(given: dict[str, Any]) -> int:
    """Train and score the learners, or score runs that exist; print the table."""
    from fastmeta.training.compare import compare, compare_runs
    from fastmeta.training.compare.plan import parse_settings, plan
    from fastmeta.training.compare.report import PICTURE, TABLE

    check_one_process("compare")
    out, resume = Path(given.pop("out")), given.get("resume", False)
    how: dict[str, Any] = {"report": partial(print, flush=True)}
    how |= {name: given.pop(name) for name in ("tasks", "overwrite") if name in given}
    if "runs" in given:
        if wrong := sorted(set(given) - {"runs", "queries", "device", "threads"}):
            raise ValueError(f"{wrong[0]}: not for --runs, whose runs are trained already")
        set_threads(given)
        comparison = compare_runs(given.pop("runs"), out, **how, **given)
    else:
        given["own"] = parse_settings(given.pop("set", []))
        if not resume:
            check_data(given)
        comparison = compare(plan(out, **given), out, resume=resume, **how)
    print(f"\n{comparison.table()}\n\nTable and commands: {out}/{TABLE}, picture: {out}/{PICTURE}")
    if number := comparison.stopped_by:
        again = f"python -m fastmeta compare --out {out} --resume"
        print(f"Stopped by {number.name}. Continue with: {again}")
        return 128 + number
    return 2 if any(entry.error for entry in comparison.entries) else 0
