"""Fair timings on a noisy machine, where contenders take turns; and durations in words."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in ``rounds`` rounds A B C, A B C, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begun)
    return {name: seconds[1:] for name, seconds in taken.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    """Speed of ``fast`` as a multiple of ``slow``: the median over rounds."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def duration(seconds: float) -> str:
    """Duration in words: ``"3 min 20 s"``, or ``"20.1 s"`` below a minute."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
