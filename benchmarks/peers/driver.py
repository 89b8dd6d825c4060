"""Measures a workload: every contender in a process of its own, all taking turns.

1. Each is prepared, and its result compared with a reference in float64; one that differs, cannot
   be built or is not installed is left out of the turns and says why.
2. A turn is a number of steps that takes about `TURN` seconds. Rounds go A B C A B C; before each
   turn there is a pause, in which the threads of the one before fall asleep.
3. The ratio of two contenders is the median over rounds. A contender whose turns would take longer
   than `LONGEST` in all stops after fewer rounds, and is compared with the same rounds of the
   others.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from benchmarks.common.agreement import TOLERANCE, relative_error
from benchmarks.common.timers import Spread
from benchmarks.common.workloads import Arrays, Workload
from benchmarks.peers.contenders import MATRIX, OURS, REFERENCES, Contender
from benchmarks.peers.process import Unable
from fastmeta.training.timing import ratio

TURN = 0.2  # seconds of a turn
LONGEST = 60.0  # seconds of all turns of one contender
FEWEST = 3  # rounds of the slowest
SETTLE = 0.05  # seconds before a turn
LONG = 1.0  # seconds of a step above which one is a turn
TRIES = 3  # timings that the number of steps in a turn is chosen by

Row = dict[str, Any]


class Worker(Protocol):
    """A contender on its workload; every method raises `Unable`."""

    def prepare(self) -> Mapping[str, Any]: ...
    def check(self) -> Arrays: ...
    def time(self, calls: int) -> float: ...
    def close(self) -> None: ...


Start = Callable[[Contender], Worker]


class Turns:
    """A contender that takes part: its worker, how it takes turns, and what they took."""

    def __init__(self, worker: Worker, rounds: int) -> None:
        self.worker = worker
        self.calls, seconds = calls_per_turn(worker)
        affordable = int(LONGEST / (self.calls * seconds))
        self.rounds = min(rounds, max(FEWEST, affordable))
        self.seconds: list[float] = []  # of a step, round by round

    def take(self) -> None:
        time.sleep(SETTLE)
        self.seconds.append(self.worker.time(self.calls) / self.calls)


def calls_per_turn(worker: Worker) -> tuple[int, float]:
    """The number of steps that take about `TURN`, and the seconds of one."""
    calls, taken = 1, worker.time(1)
    if taken > LONG:
        return calls, taken
    # The best of several: one that was disturbed would make all turns too short.
    while (taken := min(worker.time(calls) for _ in range(TRIES))) < TURN / 4:
        calls *= 4
    seconds = taken / calls
    return max(1, round(TURN / seconds)), seconds


def disagreement(actual: Arrays, expected: Arrays) -> float:
    """The largest relative error among loss and gradient, or of the product; NaN if any is."""
    if any(actual[name].shape != value.shape for name, value in expected.items()):
        return math.inf
    errors = [
        relative_error(torch.from_numpy(actual[name]), torch.from_numpy(value))
        for name, value in expected.items()
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def compared(contender: Contender, worker: Worker, expected: Arrays, rounding: float = 0.0) -> Row:
    """Prepares a contender and compares its result; status "agrees" or "differs".

    `rounding` is the error of the reference's own algorithm in single precision: a gradient jumps
    where a ReLU or a maximum tips over. Other contenders may have four times this error.
    """
    row: Row = {"label": contender.label, "status": "agrees", **worker.prepare()}
    row["error"] = disagreement(worker.check(), expected)
    allowed = max(TOLERANCE[getattr(torch, contender.dtype)], 4 * rounding)
    if not row["error"] <= allowed:
        reason = f"differs from float64 by {row['error']:.1e}, allowed is {allowed:.1e}"
        row |= {"status": "differs", "reason": reason}
    return row


class Race:
    """The contenders of one workload: `rows` of all, and `taking` turns those that can."""

    def __init__(self, start: Start, expected: Arrays, rounds: int, rounding: float = 0.0) -> None:
        self.start, self.expected, self.rounds, self.rounding = start, expected, rounds, rounding
        self.rows: dict[str, Row] = {}
        self.taking: dict[str, Turns] = {}

    def enter(self, contender: Contender, stack: contextlib.ExitStack) -> Row:
        """Prepare a contender; if it takes turns, its worker lives as long as `stack`."""
        row: Row = {"label": contender.label}
        worker = stack.enter_context(contextlib.closing(self.start(contender)))
        try:
            expected = self.expected if contender is not MATRIX else {}
            row |= compared(contender, worker, expected, self.rounding)
            if row["status"] == "agrees":
                self.taking[contender.name] = Turns(worker, self.rounds)
        except Unable as error:
            row |= {"status": error.status, "reason": str(error)}
        if contender.name not in self.taking:
            worker.close()
        self.rows[contender.name] = row
        return row

    def run(self) -> None:
        """Run the turns A B C A B C; one that fails takes no more turns and has no times."""
        for number in range(self.rounds):
            for name, turns in list(self.taking.items()):
                if number >= turns.rounds:
                    continue
                try:
                    turns.take()
                except Unable as error:
                    self.rows[name] |= {"status": error.status, "reason": str(error)}
                    del self.taking[name]

    def finish(self, flops: int) -> None:
        """Put times, ratios to fastmeta and operations per second into the rows."""
        for name, turns in self.taking.items():
            row = self.rows[name]
            spread = Spread.of(turns.seconds)
            row |= {"status": "measured", "calls": turns.calls, "seconds": spread.as_dict()}
            row["flops_per_second"] = (row["flops"] or flops) / spread.median
            if OURS in self.taking and name != MATRIX.name:
                row["ratio"] = ratio_of(turns, self.taking[OURS])
        peak = self.rows[MATRIX.name].get("flops_per_second")
        for name in self.taking if peak else ():
            self.rows[name]["of_peak"] = self.rows[name]["flops_per_second"] / peak


def ratio_of(turns: Turns, ours: Turns) -> float:
    """The median ratio of its time to fastmeta's, over the rounds in which both took part."""
    common = min(len(turns.seconds), len(ours.seconds))
    return ratio(turns.seconds[:common], ours.seconds[:common])


def reference(workload: Workload, start: Start, dtype: str = "float64") -> Arrays:
    """The reference's result; raises `Unable` if it cannot be computed."""
    contender = replace(REFERENCES[workload.kind], dtype=dtype)
    with contextlib.closing(start(contender)) as worker:
        worker.prepare()
        return worker.check()


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    start: Start,
    rounds: int,
    say: Callable[[str], None] = print,
) -> Row:
    """Measure a workload for each contender, among them the machine's matrix peak."""
    result: Row = {"what": str(workload), "kind": workload.kind, "flops": workload.flops}
    try:
        expected = reference(workload, start)
        rounding = disagreement(reference(workload, start, "float32"), expected)
        race = Race(start, expected, rounds, rounding)
    except Unable as error:
        return result | {"reason": f"no reference: {error}", "contenders": {}}
    with contextlib.ExitStack() as stack:
        for contender in (MATRIX, *contenders):
            row = race.enter(contender, stack)
            say(f"  {contender.label}: {row.get('reason', 'ready')}")
        race.run()
    race.finish(workload.flops)
    return result | {"rounding": rounding, "contenders": race.rows}
