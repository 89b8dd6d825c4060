"""The functional engine on ResNet-12, its layers on fastmeta's kernels and on PyTorch's.

    python -m benchmarks.ops.routing [--rounds 5] [--threads 2]

Second-order MAML, two tasks of 3 x 84 x 84 images, 5-way 1-shot with 5 queries, two inner steps.
They take turns. Plain layers run under `use_backend("torch")`. Freed memory is kept, as in
`python -m fastmeta train`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

import fastmeta as fm
from fastmeta.training.allocator import keep_freed_memory
from fastmeta.training.timing import interleave, ratio

TASKS, WAYS, SIZE = 2, 5, 84


def meta_steps() -> dict[str, Callable[[], object]]:
    """A meta-gradient of each kind, from the same parameters and episodes."""
    torch.manual_seed(0)
    maml = fm.MAML(fm.models.ResNet12(ways=WAYS), lr=0.01, steps=2, engine="functional")
    x, query_x = (torch.randn(TASKS, WAYS, 3, SIZE, SIZE) for _ in range(2))
    labels = torch.arange(WAYS).repeat(TASKS, 1)

    def plain() -> object:
        with fm.use_backend("torch"):
            return maml.meta_gradient(x, labels, query_x, labels)

    return {"routed": lambda: maml.meta_gradient(x, labels, query_x, labels), "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    seconds = interleave(meta_steps(), options.rounds)
    for name, times in seconds.items():
        print(f"{name:8} {statistics.median(times):6.2f} s")
    print(f"plain / routed: {ratio(seconds['plain'], seconds['routed']):.2f}")


if __name__ == "__main__":
    main()
