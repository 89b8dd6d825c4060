"""Times and peaks of memory of the functional engine and of plain PyTorch, in one interleaved run.

    python -m benchmarks functional

Before that a contender's gradient is compared with the task loop's in float64: in float32 rounding
flips units of a deep network with ReLU. Peaks are of tensors, counted in bytes, and are taken apart
from the times.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.functional.contenders import CONTENDERS, OURS, Gradient, Problem, task_loop
from benchmarks.functional.networks import CASES
from fastmeta.core.peak_bytes import PeakBytes
from fastmeta.training.timing import interleave

ROUNDS = 7
MOST = 1e-8  # relative error of a float64 gradient


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def peak(step: Callable[[], Gradient]) -> int:
    """Bytes of tensors beyond those before the step."""
    with PeakBytes() as memory:
        step()
    return memory.peak


def measure(name: str, rounds: int, contenders: list[str]) -> list[str]:
    """The lines of a case's table."""
    case = CASES[name]
    reference = task_loop(Problem(case, torch.float64))()[1]
    errors = {
        key: relative_error(CONTENDERS[key](Problem(case, torch.float64))()[1], reference)
        for key in contenders
    }
    steps = {key: CONTENDERS[key](Problem(case)) for key in contenders}
    peaks = {key: peak(step) for key, step in steps.items()}
    taken = interleave(steps, rounds)
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    lines = []
    for key in contenders:
        ratios = [a / b for a, b in zip(taken[key], taken[OURS], strict=True)]
        wrong = "" if errors[key] < MOST else f"  WRONG: relative error {errors[key]:.1e}"
        lines.append(
            f"{name:<12}{key:<12}{1e3 * medians[key]:10.1f} ms{statistics.median(ratios):9.2f}"
            f"{peaks[key] / 2**20:10.1f} MiB{wrong}"
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    add("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    add("--threads", type=int, default=torch.get_num_threads())


def main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, float32, {options.rounds} interleaved rounds")
    print(f"{'network':<12}{'':<12}{'median':>13}{'ratio':>9}{'peak':>14}")
    for name in options.only:
        for line in measure(name, options.rounds, list(CONTENDERS)):
            print(line, flush=True)
    return 0
