"""The parts of a training iteration of a small network, timed one after the other.

    python -m benchmarks.peers.iteration_parts
    python -m benchmarks.peers.iteration_parts --workload sin5_iteration --threads 2

Prints a table in Markdown: medians in microseconds, and shares of their sum. `default Adam` is
timed in the same iterations and is not in the sum.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from benchmarks.common.workloads import WORKLOADS, draw, draw_episode
from benchmarks.ops.distances import line
from benchmarks.peers.fastmeta_steps import learner
from benchmarks.peers.modules import TorchProblem
from benchmarks.peers.step import Problem

PARTS = ("episode", "meta_gradient", "assign_to", "fused Adam", "default Adam")
COLUMNS = ["part", "us", "share"]


def times(workload: str, rounds: int) -> list[list[float]]:
    """Seconds of each part in each iteration; the first tenth is left out."""
    sizes = WORKLOADS[workload]
    setting = TorchProblem(Problem(sizes, draw(sizes)))
    maml, tasks = learner(setting)
    params = list(maml.parameters())
    fused, default = (torch.optim.Adam(params, lr=0.0, fused=f) for f in (True, None))
    found = []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        for name, array in draw_episode(sizes).items():
            setting.data[name].copy_(torch.from_numpy(array))
        marks.append(time.perf_counter())
        result = maml.meta_gradient(*tasks)
        marks.append(time.perf_counter())
        result.assign_to(maml)
        for optimizer in (fused, default):
            marks.append(time.perf_counter())
            optimizer.step()
        marks.append(time.perf_counter())
        found.append([end - begin for begin, end in itertools.pairwise(marks)])
    return found[rounds // 10 :]


def table(workload: str, rounds: int) -> list[list[str]]:
    medians = [statistics.median(part) for part in zip(*times(workload, rounds), strict=True)]
    total = sum(medians[:-1])
    return [
        [part, f"{1e6 * t:.0f}", f"{t / total:.0%}"] for part, t in zip(PARTS, medians, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="sin1_iteration", help="default sin1_iteration")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.workload}, {options.threads} threads, torch {torch.__version__}\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n")
    for row in table(options.workload, options.rounds):
        print(line(row))


if __name__ == "__main__":
    main()
