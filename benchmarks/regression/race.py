"""Race of two revisions on one workload: turns A B, B A, A B, ..., of a fixed number of steps.

Before each turn there is a pause, in which the threads of the turn before fall asleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

SETTLE = 0.05  # seconds before a turn
TRIES = 3  # timings that the number of steps in a turn is chosen by


class Side(Protocol):
    """One revision on its prepared workload; `time` gives the seconds of a number of steps."""

    def time(self, calls: int) -> float: ...


@dataclass
class Times:
    """Seconds of one step, round by round."""

    base: list[float] = field(default_factory=list)
    present: list[float] = field(default_factory=list)


def calls_per_turn(side: Side, seconds: float) -> int:
    """Count the steps that fill a turn's seconds; a longer step is a turn by itself."""
    calls = 1
    # The best of several: one that was disturbed would make all turns too short.
    while (taken := min(side.time(calls) for _ in range(TRIES))) < seconds / 4:
        calls *= 4
    return max(1, round(seconds * calls / taken))


def race(
    base: Side,
    present: Side,
    rounds: int,
    calls: int,
    pause: Callable[[float], object] = time.sleep,
) -> Times:
    """Time both sides in turns. The order flips each round, so that neither is always second."""
    times = Times()
    turns = [(base, times.base), (present, times.present)]
    for _ in range(rounds):
        for side, taken in turns:
            pause(SETTLE)
            taken.append(side.time(calls) / calls)
        turns.reverse()
    return times
