"""Meta-steps on a machine whose processors another process uses, too.

A process that only counts is started and stopped by turns, and every single step is timed. On two
processors the step's two threads then share them with a third.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.regression.workloads import WORKLOADS

NAMES = ("sin1", "omni_mlp", "anil")
ROUNDS = 8  # turns of each state
SECONDS = 1.0  # of a turn
HEADER = (
    f"{'workload':<12}{'quiet':>12}{'95 %':>12}{'busy':>12}{'95 %':>12}"
    f"{'busy / quiet':>16}{'95 % / quiet':>14}"
)


@dataclass(frozen=True)
class Seconds:
    """Times of single steps, with the processors for themselves and with a neighbour."""

    quiet: list[float]
    busy: list[float]

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.busy) / statistics.median(self.quiet)

    @property
    def tail_ratio(self) -> float:
        """95th percentile beside a neighbour, over the median without one."""
        return percentile(self.busy, 95) / statistics.median(self.quiet)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _count() -> None:
    while True:
        pass


@contextlib.contextmanager
def neighbour(processes: int) -> Iterator[None]:
    """Context with so many processes that never wait."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_count, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        time.sleep(0.5)  # until they have begun
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def steps(step: Callable[[], object], seconds: float) -> list[float]:
    """Times of single steps, one after the other."""
    for _ in range(3):
        step()
    taken, end = [], time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return taken


def measure(name: str, rounds: int, seconds: float, processes: int) -> Seconds:
    step = WORKLOADS[name]()
    found = Seconds([], [])
    for _ in range(rounds):
        found.quiet.extend(steps(step, seconds))
        with neighbour(processes):
            found.busy.extend(steps(step, seconds))
    return found


def line_of(name: str, found: Seconds) -> str:
    times = [
        1e3 * value
        for part in (found.quiet, found.busy)
        for value in (statistics.median(part), percentile(part, 95))
    ]
    columns = "".join(f"{value:9.3f} ms" for value in times)
    return f"{name:<12}{columns}{found.median_ratio:16.2f}{found.tail_ratio:14.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = ", ".join(WORKLOADS)
    add("--only", nargs="+", choices=WORKLOADS, default=NAMES, metavar="NAME", help=known)
    add("--rounds", type=int, default=ROUNDS, help=f"turns of each state, default {ROUNDS}")
    add("--seconds", type=float, default=SECONDS, help=f"of a turn, default {SECONDS:g}")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--processes", type=int, default=1, help="that never wait, default 1")


def main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, {options.processes} busy processes beside them")
    print(HEADER)
    for name in options.only:
        found = measure(name, options.rounds, options.seconds, options.processes)
        print(line_of(name, found), flush=True)
    return 0
