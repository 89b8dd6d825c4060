"""The command `regression` of `python -m benchmarks`: is the working tree slower than a revision?

Both are compiled, then take turns on each workload in a process each. It exits with 1 if the
median ratio of a workload exceeds the threshold, or if a workload cannot be run by both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu.machine import ROOT
from benchmarks.peers.run import facts
from benchmarks.regression import revisions
from benchmarks.regression.process import Failed, Process
from benchmarks.regression.race import Times, calls_per_turn, race
from benchmarks.regression.ratios import Ratio, slower_than
from benchmarks.regression.workloads import WORKLOADS

ROUNDS = 15
SECONDS = 0.2
THRESHOLD = 1.05
HEADER = f"{'workload':<18}{'base':>12}{'present':>12}{'ratio':>8}{'10 %':>8}{'90 %':>8}{'best':>8}"


class Revision(Protocol):
    """A process of one revision; each method raises `Failed`."""

    def prepare(self, workload: str) -> None: ...
    def time(self, calls: int) -> float: ...


@dataclass
class Report:
    """Times and ratios of the workloads that both revisions ran, and the errors of the others."""

    times: dict[str, Times] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        rows = {
            name: {"ratio": asdict(ratio), "seconds": asdict(self.times[name])}
            for name, ratio in self.ratios.items()
        }
        return {"workloads": rows, "errors": self.errors}


def _at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = kind(value)
        except ValueError:
            number = float("nan")
        if not least <= number < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} of at least {least}, got {value!r}")
        return number

    return parse


def _workload(value: str) -> str:
    if value not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {value!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, metavar="REV", help="the revision to compare with")
    add("--only", nargs="+", action="extend", type=_workload, metavar="NAME", help="default all")
    add("--rounds", type=_at_least(int, 2), default=ROUNDS, help=f"default {ROUNDS}")
    add("--seconds", type=_at_least(float, 0.001), default=SECONDS, help="of a turn, default 0.2")
    add("--threads", type=_at_least(int, 1), default=torch.get_num_threads())
    add("--threshold", type=_at_least(float, 1.0), default=THRESHOLD, help="default 1.05")
    add("--out", type=Path, metavar="FILE", help="writes times and ratios as JSON")


def line_of(name: str, times: Times, ratio: Ratio) -> str:
    medians = (1e3 * statistics.median(seconds) for seconds in (times.base, times.present))
    columns = "".join(f"{milliseconds:9.3f} ms" for milliseconds in medians)
    figures = (ratio.median, ratio.low, ratio.high, ratio.best)
    return f"{name:<18}{columns}" + "".join(f"{figure:8.3f}" for figure in figures)


def compare(
    base: Revision, present: Revision, workloads: Iterable[str], rounds: int, seconds: float
) -> Report:
    """Race both revisions on each workload and print its line; one that fails is skipped."""
    report = Report()
    print(HEADER)
    for name in workloads:
        try:
            base.prepare(name)
            present.prepare(name)
            times = race(base, present, rounds, calls_per_turn(base, seconds))
        except Failed as error:
            report.errors[name] = str(error)
            print(f"{name:<18}{error}", flush=True)
            continue
        report.times[name], report.ratios[name] = times, Ratio.of(times.base, times.present)
        print(line_of(name, times, report.ratios[name]), flush=True)
    return report


def verdict(report: Report, threshold: float) -> int:
    """Print the workloads that are slower than the threshold; returns the exit code."""
    slower = slower_than(threshold, report.ratios)
    if slower:
        print(f"slower than {threshold:g} times the base: {', '.join(slower)}")
    else:
        print(f"no workload measured is slower than {threshold:g} times the base")
    if report.errors:
        print(f"not measured: {', '.join(report.errors)}")
    return 1 if slower or report.errors else 0


def main(options: argparse.Namespace) -> int:
    """Exit code 2 says that nothing could be compared."""
    names = list(dict.fromkeys(options.only or WORKLOADS))
    try:
        folder = revisions.prepare(options.base, ROOT)
        with contextlib.ExitStack() as stack:
            roots = {"base": folder, "present": ROOT}
            base, present = (
                stack.enter_context(contextlib.closing(Process(name, root, options.threads)))
                for name, root in roots.items()
            )
            report = compare(base, present, names, options.rounds, options.seconds)
    except (revisions.Refused, Failed) as error:
        print(f"python -m benchmarks regression: {error}", file=sys.stderr)
        return 2
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"base": folder.name, **facts("cpu", options.threads)}
        options.out.write_text(json.dumps({"facts": about, **report.as_dict()}, indent=1) + "\n")
    return verdict(report, options.threshold)
