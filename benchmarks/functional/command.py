"""Times and peaks of memory of the functional engine and of plain PyTorch, in one interleaved run.

    python -m benchmarks functional
    python -m benchmarks functional --only sin_big --beside adjoint "task loop"
    python -m benchmarks functional --profile --only omni_mlp

Prints a table in Markdown: medians, in brackets the median ratio to fastmeta's time, and peaks of
memory, which are of tensors, counted in bytes, and taken apart from the times. The last column is
the smallest ratio of the others: above 1, fastmeta is faster than each of them.

Before that a contender's gradient is compared with the task loop's in float64: in float32 rounding
flips units of a deep network with ReLU. A wrong one is told, and leaves the last column. Exit
status 1 if it is fastmeta's. ``--beside`` leaves the cells of other contenders empty, some of which
take minutes. With ``--profile``: the largest shares of fastmeta's own time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.functional.contenders import (
    CONTENDERS,
    FASTMETA,
    OURS,
    Gradient,
    Problem,
    task_loop,
)
from benchmarks.functional.networks import CASES, Case
from benchmarks.peers.tables import digits, duration
from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.training.timing import interleave, ratio

ROUNDS = 7
MOST = 1e-8  # relative error of a float64 gradient
MOST_SHOWN = 8
COLUMNS = ["network", *CONTENDERS, "fastest of the others"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def peak(step: Callable[[], Gradient]) -> int:
    """Bytes of tensors beyond those before the step."""
    with PeakBytes() as memory:
        step()
    return memory.peak


def errors_of(case: Case, measured: list[str]) -> dict[str, float]:
    """The measured contenders' relative errors in float64, on two tasks."""
    case = replace(case, tasks=min(2, case.tasks))
    expected = task_loop(Problem(case, torch.float64))()[1]
    return {
        name: relative_error(CONTENDERS[name](Problem(case, torch.float64))()[1], expected)
        for name in measured
    }


def row(name: str, case: Case, rounds: int, errors: dict[str, float]) -> list[str]:
    """The cells of a case, for contenders with these errors."""
    steps = {key: CONTENDERS[key](Problem(case)) for key in errors}
    peaks = {key: peak(step) for key, step in steps.items()}
    taken = interleave(steps, rounds)
    ratios = {key: ratio(seconds, taken[OURS]) for key, seconds in taken.items()}
    cells = [name]
    for key in CONTENDERS:
        if key not in errors:
            cells.append("")
            continue
        time = duration(statistics.median(taken[key]))
        relative = "" if key == OURS else f" ({ratios[key]:.2f})"
        wrong = "" if errors[key] < MOST else f", WRONG: relative error {errors[key]:.1e}"
        cells.append(f"{time}{relative}, {digits(peaks[key] / 2**20)} MiB{wrong}")
    right = [key for key in errors if key not in FASTMETA and errors[key] < MOST]
    return [*cells, f"{min(ratios[key] for key in right):.2f}"]


def profile_of(step: Callable[[], Gradient]) -> str:
    """The kernels that take most of a step's time, the third one."""
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    largest = [e for e in events if "::" in e.key][:MOST_SHOWN]  # kernels, no graph's nodes
    shares = (
        f"{e.key.split('::')[-1]} {100 * e.self_cpu_time_total / total:.0f} %" for e in largest
    )
    return f"{duration(total / 1e6)}: {', '.join(shares)}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def changed(case: Case, options: argparse.Namespace) -> Case:
    """The case with the numbers that the command line gives."""
    given = {"tasks": options.tasks, "steps": options.steps}
    return replace(case, **{name: n for name, n in given.items() if n is not None})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    others = [name for name in CONTENDERS if name != OURS]
    add("--beside", nargs="+", choices=others, default=others, metavar="CONTENDER")
    add("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--profile", action="store_true", help="show where fastmeta's time goes")
    add("--tasks", type=int, metavar="T", help="instead of the case's own number")
    add("--steps", type=int, metavar="K", help="instead of the case's own number")


def main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, float32, {options.rounds} interleaved rounds\n")
    if options.profile:
        for name in options.only:
            step = CONTENDERS[OURS](Problem(changed(CASES[name], options)))
            print(line([name, profile_of(step)]), flush=True)
        return 0
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    is_wrong = False
    for name in options.only:
        case = changed(CASES[name], options)
        errors = errors_of(case, [OURS, *options.beside])
        is_wrong |= any(not errors[key] < MOST for key in FASTMETA if key in errors)
        print(line(row(name, case, options.rounds, errors)), flush=True)
    return int(is_wrong)
