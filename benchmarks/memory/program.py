"""Memory of a meta-step: the engine that MAML picks, the functional engine, the unrolled graph.

    python -m benchmarks.memory.program [--workload NAME ...]

The count is of bytes from torch's allocator, in Python and in native ops, workspaces included: the
peak of the bytes alive, besides those alive before, at K = 2 and at K = 10 inner steps. The adjoint
takes O(T (K P + activations of one step)): from K to K' steps it may grow by at most T (K' - K) P
numbers, and by less if only tasks at work have a workspace. CPU only.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common.workloads import WORKLOADS, Workload, draw
from benchmarks.peers import fastmeta_steps, torch_steps
from benchmarks.peers.step import Build, Problem

STEPS = (2, 10)
DEFAULT = ("sin5", "omni_mlp")
WAYS: dict[str, Build] = {
    "fastmeta": fastmeta_steps.chosen,
    "fastmeta, functional engine": fastmeta_steps.functional,
    "unrolled, torch.func": torch_steps.unrolled,
}


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes of torch's CPU allocator alive at once of those that `run` asks for.

    Example:
        >>> import torch
        >>> allocated_peak(lambda: torch.ones(1000) + torch.ones(1000))
        12000
    """
    with ThreadPoolExecutor(1) as thread:  # a new one has not kept a workspace from earlier calls
        events = thread.submit(_recorded, run).result()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in memory), initial=0))


def _recorded(run: Callable[[], object]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    return record.profiler.kineto_results.events()


def peaks(workload: Workload) -> dict[str, list[int]]:
    """Bytes of each way, at each number of steps."""
    peaks_of: dict[str, list[int]] = {name: [] for name in WAYS}
    for steps in STEPS:
        problem = Problem(replace(workload, steps=steps), draw(workload))
        for name, build in WAYS.items():
            step = build(problem)
            step.run()  # gradients that a first call creates are no workspace
            peaks_of[name].append(allocated_peak(step.run))
    return peaks_of


def report(workload: Workload, peaks_of: dict[str, list[int]]) -> str:
    shown = replace(workload, steps=STEPS[1])
    lines = [f"{shown}, float32: peak memory, MB"]
    lines.append(f"{'':28}" + "".join(f"{f'K = {steps}':>10}" for steps in STEPS))
    for name, sizes in peaks_of.items():
        lines.append(f"{name:28}" + "".join(f"{size / 1e6:10.2f}" for size in sizes))
    few, many = peaks_of["fastmeta"]
    unrolled = peaks_of["unrolled, torch.func"][1]
    kept = 4 * workload.tasks * workload.parameters * (STEPS[1] - STEPS[0])
    lines.append(f"fastmeta / unrolled at K = {STEPS[1]}: {many / unrolled:.3f}")
    lines.append(
        f"grown from K = {STEPS[0]} to {STEPS[1]} by {(many - few) / 1e6:.2f} MB; "
        f"{STEPS[1] - STEPS[0]} T P numbers are {kept / 1e6:.2f} MB"
    )
    return "\n".join(lines)


def main(names: Sequence[str] = DEFAULT) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports on itself else
    for name in names:
        print(report(WORKLOADS[name], peaks(WORKLOADS[name])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    meta = [name for name, workload in WORKLOADS.items() if workload.kind == "meta"]
    parser.add_argument("--workload", nargs="+", choices=meta, default=DEFAULT)
    main(parser.parse_args().workload)
