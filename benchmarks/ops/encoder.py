"""ProtoNet's training step with its encoder on fastmeta's kernels, and in plain PyTorch, float32.

    python -m benchmarks.ops.encoder [--only conv4 resnet12] [--rounds 9] [--threads 1 2]

conv4: Conv4-64, four tasks of 20 ways, 1 shot and 5 queries, 480 images of 1 x 28 x 28. resnet12:
ResNet-12, 5 ways, 1 shot and 5 queries, 30 images of 3 x 84 x 84. One line for each of a training
step (loss, gradients, SGD) and the features of all images in eval() without gradients; first
lowered, then `lower=False`, and how many times faster. They take turns. Freed memory is kept, as in
`python -m fastmeta train`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import fastmeta as fm
from fastmeta.training.allocator import keep_freed_memory
from fastmeta.training.timing import interleave, ratio

QUERIES = 5


class Workload(NamedTuple):
    encoder: Callable[[], nn.Module]
    tasks: int
    ways: int
    image: tuple[int, int, int]


WORKLOADS = {
    "conv4": Workload(lambda: fm.models.Conv4(64, None), 4, 20, (1, 28, 28)),
    "resnet12": Workload(lambda: fm.models.ResNet12(ways=None), 1, 5, (3, 84, 84)),
}

Calls = dict[str, Callable[[], object]]


def calls(workload: Workload) -> dict[str, Calls]:
    """The two calls of each line, from the same parameters and episodes."""
    torch.manual_seed(0)
    encoder = workload.encoder()
    tasks, ways, image = workload.tasks, workload.ways, workload.image
    support_x = torch.randn(tasks, ways, *image)
    query_x = torch.randn(tasks, ways * QUERIES, *image)
    support_y = torch.arange(ways).repeat(tasks, 1)
    batch = support_x, support_y, query_x, support_y.repeat(1, QUERIES)
    images = torch.cat([support_x, query_x], dim=1).flatten(0, 1)

    def step(lower: str | bool) -> Callable[[], object]:
        learner = fm.ProtoNet(copy.deepcopy(encoder), lower=lower)
        optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)

        def run() -> None:
            optimizer.zero_grad()
            loss, _ = learner.meta_loss(*batch, num_classes=ways, return_logits=False)
            loss.backward()
            optimizer.step()

        return run

    def features(lower: str | bool) -> Callable[[], object]:
        learner = fm.ProtoNet(copy.deepcopy(encoder), lower=lower).eval()
        return torch.no_grad()(lambda: learner(images))

    return {
        name: {"lowered": call("auto"), "PyTorch": call(False)}
        for name, call in (("training step", step), ("features", features))
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.encoder", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    keep_freed_memory()
    print("encoder    call           threads     lowered      PyTorch   times")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.only:
            for call, contenders in calls(WORKLOADS[name]).items():
                seconds = interleave(contenders, options.rounds)
                times = "".join(f"{1e3 * statistics.median(s):10.1f} ms" for s in seconds.values())
                faster = ratio(seconds["PyTorch"], seconds["lowered"])
                print(f"{name:10} {call:14} {threads:7} {times} {faster:7.2f}")


if __name__ == "__main__":
    main()
