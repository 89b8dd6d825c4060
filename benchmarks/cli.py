"""The commands `run`, `report`, `regression`, `busy` and `functional` of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import busy
from benchmarks.common.workloads import WORKLOADS
from benchmarks.functional import command as functional
from benchmarks.peers import first_screen, results, tables
from benchmarks.peers.contenders import CONTENDERS, OURS
from benchmarks.peers.run import run
from benchmarks.regression import command as regression

PEERS = tuple(dict.fromkeys(c.name for c in CONTENDERS if c.name != OURS))
ROUNDS = 15


def _one_of(known: Iterable[str], what: str) -> Callable[[str], str]:
    """Make an argparse type whose error lists the known values."""
    known = tuple(known)

    def parse(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {value!r}; there are {', '.join(known)}"
            )
        return value

    return parse


def _at_least(least: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not value.isdigit() or int(value) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {value!r}"
            )
        return int(value)

    return parse


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command")
    measure = commands.add_parser("run", help="measure fastmeta and its peers")
    workload, peer = _one_of(WORKLOADS, "workload"), _one_of(PEERS, "peer")
    measure.add_argument("--workload", nargs="+", action="extend", type=workload, metavar="NAME")
    measure.add_argument("--peer", nargs="+", action="extend", type=peer, metavar="NAME")
    measure.add_argument("--rounds", type=_at_least(2), default=ROUNDS, help=f"default {ROUNDS}")
    measure.add_argument("--threads", type=_at_least(1), default=torch.get_num_threads())
    report = commands.add_parser("report", help="draw the picture and print the table of a run")
    report.add_argument(
        "--keep", action="store_true", help="as committed results, and in the documents"
    )
    for command in (measure, report):
        command.add_argument("--device", choices=results.DEVICES, default="cpu")
        command.add_argument("--out", type=Path, default=results.OUT, help="folder of the results")
    about = "compile an earlier revision and say whether the working tree is slower"
    regression.add_arguments(commands.add_parser("regression", help=about))
    about = "time single meta-steps alone and beside another busy process"
    busy.add_arguments(commands.add_parser("busy", help=about))
    about = "compare the functional engine with plain PyTorch on networks of today"
    functional.add_arguments(commands.add_parser("functional", help=about))
    return top


def peers(options: argparse.Namespace) -> int:
    """Run `run`: exit code 1 if a result was wrong or could not be compared."""
    names = options.workload or [name for name, w in WORKLOADS.items() if w.default]
    workloads = [WORKLOADS[name] for name in dict.fromkeys(names)]
    report = run(
        workloads, options.peer, options.device, options.rounds, options.threads, options.out
    )
    done = [result["contenders"].get(OURS, {}) for result in report["workloads"].values()]
    return 0 if all(row.get("status") == "measured" for row in done) else 1


def report(options: argparse.Namespace) -> int:
    run = results.load(options.device, options.out)
    if run is None:
        path = results.json_of(options.device, options.out)
        print(f"python -m benchmarks report: there is no {path}; `run` makes it", file=sys.stderr)
        return 1
    for name, result in run["workloads"].items():
        print(tables.of_workload(name, result), end="\n\n")
    print(tables.of_facts(run))
    for path in results.render(run, options.out):
        print(path)
    if options.keep:
        results.keep(options.device, options.out)
        first_screen.keep()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "regression":
        return regression.main(options)
    if options.command == "busy":
        return busy.main(options)
    if options.command == "functional":
        return functional.main(options)
    return report(options) if options.command == "report" else peers(options)
