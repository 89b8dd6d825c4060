"""Ratios of paired times: their median, their spread, and the verdict over a threshold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Time of the working tree over time of the base: above 1 the working tree is slower."""

    median: float  # of the rounds' ratios
    low: float  # their 10th percentile
    high: float  # their 90th percentile
    best: float  # the fastest round of one side over the fastest of the other

    @classmethod
    def of(cls, base: Sequence[float], present: Sequence[float]) -> Ratio:
        """Pairs the rounds, so that a disturbance longer than a round cancels out."""
        ratios = [p / b for b, p in zip(base, present, strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        best = min(present) / min(base)
        return cls(statistics.median(ratios), deciles[0], deciles[-1], best)


def slower_than(threshold: float, ratios: Mapping[str, Ratio]) -> list[str]:
    """Names of the workloads whose median ratio exceeds the threshold."""
    return [name for name, ratio in ratios.items() if ratio.median > threshold]
