"""Many inner steps: what ``memory="segments"`` costs and saves against ``memory="recompute"``.

    python -m benchmarks.memory.segments [--rounds 9] [--threads 2]

Meta-gradients of the functional engine on an MLP, second order. Printed is the peak of the tensors'
bytes, which is counted (``fastmeta.core.peak_bytes``) and the same every time. With ``--rounds``
also the time of ``"recompute"``, and the other's as a multiple of it. Both results must be equal
bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastmeta as fm
from benchmarks.memory.meta import peak
from benchmarks.ops.distances import line
from fastmeta.training.timing import interleave, ratio

MODES = ("recompute", "segments")
RULES: dict[str, Callable[[], fm.rules.Rule | None]] = {
    "plain descent": lambda: None,
    "Adam": lambda: fm.rules.Adam(eps=1e-6),
}


class Case(NamedTuple):
    """An inner loop of K steps on T tasks, by a rule, of an MLP of the given widths."""

    rule: str
    steps: int
    tasks: int = 4
    widths: tuple[int, ...] = (784, 128, 64, 5)
    support: int = 25


CASES = [Case(rule, steps) for rule in RULES for steps in (16, 64)]


def calls(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The meta-gradient in each mode."""
    torch.manual_seed(0)
    net = fm.models.MLP(list(case.widths))
    x = torch.randn(case.tasks, case.support, case.widths[0])
    y = torch.arange(case.support).remainder(case.widths[-1]).expand(case.tasks, -1).contiguous()
    options = {"engine": "functional", "task_chunk": None}

    def call(memory: str) -> Callable[[], Tensor]:
        maml = fm.MAML(net, 0.01, case.steps, rule=RULES[case.rule](), memory=memory, **options)
        return lambda: maml.meta_gradient(x, y, x, y).grads

    return {memory: call(memory) for memory in MODES}


def row(case: Case, rounds: int) -> list[str]:
    by_mode = calls(case)
    if not torch.equal(*(call() for call in by_mode.values())):
        raise SystemExit(f"{case.rule}, K = {case.steps}: the modes differ")
    sizes = [f"{peak(call, torch.device('cpu')) / 2**20:.3g} MiB" for call in by_mode.values()]
    name = f"{case.rule}, K = {case.steps}"
    if not rounds:
        return [name, *sizes]
    seconds = interleave(by_mode, rounds)
    times = ratio(seconds["segments"], seconds["recompute"])
    median = 1000 * statistics.median(seconds["recompute"])
    return [name, f"{sizes[0]}, {median:.3g} ms", f"{sizes[1]}, {times:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.segments")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="of times; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = "-".join(map(str, CASES[0].widths))
    print(f"MLP {layers}, T {CASES[0].tasks}, S {CASES[0].support}, torch {torch.__version__}\n")
    columns = ["", *(f'`memory="{memory}"`' for memory in MODES)]
    for cells in (columns, ["---"] * len(columns)):
        print(line(cells))
    for case in CASES:
        print(line(row(case, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
