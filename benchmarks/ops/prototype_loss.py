"""prototype_loss against the composition of torch ops that it replaces: time and memory.

    python -m benchmarks.ops.prototype_loss

Forward and backward to queries and prototypes, float32. The composition is the usual one: expanded
squared distances, cross entropy, autograd. Embeddings have norm 1, as of a network in training
(far apart, softmax weights underflow, which slows the composition on a CPU and would flatter us).
Memory is the growth of the process's peak, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import fastmeta as fm
from fastmeta.training.timing import interleave, ratio

# T, Q, N, D of WORKLOADS: 60-way 5-shot episodes, and a classifier with very many classes.
WORKLOADS = {
    "proto_small, T = 1": (1, 300, 60, 64),
    "proto_small, T = 32": (32, 300, 60, 64),
    "proto_big": (1, 20_000, 10_000, 512),
}

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rows(workload: str) -> Rows:
    """Queries, labels and prototypes."""
    t, q, n, d = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    query, prototypes = (torch.randn(t, k, d, generator=generator) / d**0.5 for k in (q, n))
    labels = torch.randint(n, (t, q), generator=generator)
    return query.requires_grad_(), labels, prototypes.requires_grad_()


def fused(query: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    return fm.prototype_loss(query, labels, prototypes)


def composed(
    query: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    norms = query.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
    logits = 2 * query @ prototypes.mT - norms
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


CONTENDERS = {"fastmeta": fused, "composition": composed}


def step(loss: Callable[..., torch.Tensor], data: Rows) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(*data), (data[0], data[2]))


def peak_memory() -> int:
    """The peak of this process's resident bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def extra_memory(workload: str, contender: str) -> int:
    """Bytes by which a step raises the peak of a fresh process, warmed up on a small workload."""
    code = (
        "from benchmarks.ops.prototype_loss import *\n"
        f"step(CONTENDERS[{contender!r}], rows('proto_small, T = 1'))\n"
        f"data = rows({workload!r}); before = peak_memory()\n"
        f"gradient = step(CONTENDERS[{contender!r}], data); print(peak_memory() - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return int(output.stdout)


def report(workload: str, rounds: int) -> str:
    data = rows(workload)
    calls = {name: lambda loss=loss: step(loss, data) for name, loss in CONTENDERS.items()}
    seconds = interleave(calls, rounds)
    times = "  ".join(f"{n} {1e3 * statistics.median(s):9.2f} ms" for n, s in seconds.items())
    speedup = ratio(seconds["composition"], seconds["fastmeta"])
    return f"{workload:20} {times}   {speedup:.2f} times as fast"


def memory_report(workload: str) -> str:
    peaks = {name: extra_memory(workload, name) for name in CONTENDERS}
    sizes = "  ".join(f"{name} {size / 1e6:9.1f} MB" for name, size in peaks.items())
    t, q, n, d = WORKLOADS[workload]
    gradients = 4 * t * d * (q + n)
    beyond = [(size - gradients) / 1e6 for size in peaks.values()]
    return (
        f"{workload:20} {sizes}   with the gradients, {gradients / 1e6:.1f} MB;"
        f" beyond them {beyond[0] / beyond[1]:.1%} of the composition's"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    print(
        f"prototype_loss, forward and backward, float32, CPU, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, backend {fm.backend_of('prototype_loss')}"
    )
    for workload in WORKLOADS:
        print(report(workload, 3 if workload == "proto_big" else options.rounds))
    print("peak memory of a step")
    print(memory_report("proto_big"))


if __name__ == "__main__":
    main()
