"""The interface of a contender: a workload becomes one step, ready to run and to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.workloads import Arrays, Workload


class Missing(Exception):
    """Raised if a requirement of a contender is missing on this machine; the message names it."""


@dataclass(frozen=True)
class Problem:
    """A workload with its numbers, for one device and one floating-point type."""

    workload: Workload
    arrays: Arrays
    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # or "float64"


def nothing() -> None:
    """Wait for nothing: a CPU has done its work when a call returns."""


@dataclass(frozen=True)
class Step:
    run: Callable[[], Any]  # one meta-step
    read: Callable[[Any], Arrays]  # of what `run` returned: loss [] and gradient [P], or product
    wait: Callable[[], None] = nothing  # until what was run is done
    facts: Mapping[str, str] = field(default_factory=dict)  # versions and precision
    flops: float | None = None  # of a step, where the workload does not say


Build = Callable[[Problem], Step]
