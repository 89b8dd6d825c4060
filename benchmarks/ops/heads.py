"""Heads on stored features beside easyfsl, which takes one task a call.

    python -m benchmarks.ops.heads
    python -m benchmarks.ops.heads --only TIM PTMAP --tasks 64 --rounds 15
    python -m benchmarks.ops.heads --golden tests/heads/easyfsl.npz

Prints a table in Markdown: milliseconds a task of fm.heads, on a batch of tasks, and of easyfsl,
which computes the first tasks of the batch one by one; and the largest difference of their logits
where both take the same steps. They take turns, on one thread. 5 ways, 5 shots, 75 queries, 640
features, all of length 1. The column of easyfsl is empty where it is not installed:

    pip install easyfsl

`--golden` writes the logits of easyfsl on two small tasks, which the tests compare with.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.heads import Head
from fastmeta.training.allocator import keep_freed_memory
from fastmeta.training.files import write_atomically
from fastmeta.training.timing import interleave, ratio

COLUMNS = ["head", "fastmeta, ms", "easyfsl, ms", "ratio", "largest difference"]
THEIR_TASKS = 4  # of a round
OURS, THEIRS = "fastmeta", "easyfsl"


class Pair(NamedTuple):
    """A head, the class of easyfsl that it stands beside, and what makes its logits easyfsl's.

    Attributes:
        tolerance: of their difference. easyfsl ends Sinkhorn's iterations of PT-MAP where they
            change sums by less than 1e-6, and the updates of LaplacianShot where they change the
            energy by less than 1e-6 of it. Without these stops the differences are 8e-7 and 2e-7.
    """

    head: Head
    peer: str | None
    as_peer: Callable[[Tensor], Tensor] | None = None  # None: the methods differ in their steps
    tolerance: float = 1e-5


def same(logits: Tensor) -> Tensor:
    return logits


H = fm.heads
# In easyfsl's configuration. Its scores of TIM have no temperature, and some are probabilities.
PAIRS = {
    "NearestCentroid": Pair(
        H.NearestCentroid("euclidean", normalize=True), "PrototypicalNetworks", same
    ),
    "SimpleShot": Pair(H.SimpleShot("cosine"), "SimpleShot", lambda logits: logits + 1),
    "BDCSPN": Pair(H.BDCSPN(1.0, shift_queries=False), "BDCSPN", same),
    "LaplacianShot": Pair(
        H.LaplacianShot(scale=1.0, shift_queries=False),
        "LaplacianShot", lambda logits: logits.softmax(-1), 5e-5,
    ),
    "PTMAP": Pair(
        H.PTMAP(normalize=True, unit_length=False),
        "PTMAP", lambda logits: logits.exp(), 5e-5,
    ),
    "TIM, Adam": Pair(
        H.TIM(50, None, 10.0, 1.0, 1.0, 0.1, "cosine", "adam"),
        "TIM", lambda logits: logits / 10,
    ),
    "TIM": Pair(H.TIM(50, None, 10.0, 1.0, 1.0, 0.1, "cosine"), "TIM"),
    "TransductiveFinetuning, Adam": Pair(
        H.TransductiveFinetuning(optimizer="adam"), "TransductiveFinetuning", same
    ),
    "TransductiveFinetuning": Pair(H.TransductiveFinetuning(), "TransductiveFinetuning"),
    "SoftKMeans": Pair(H.SoftKMeans(normalize=True), None),
    "Ridge": Pair(H.Ridge(), None),
    "Logistic": Pair(H.Logistic(), None),
    "FEAT": Pair(H.FEAT(640, dropout=0.0).eval(), None),
}  # fmt: skip


class _Absent(ModuleType):
    """Stands for torchvision, which easyfsl imports for its networks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def easyfsl_methods() -> ModuleType | None:
    """The methods of easyfsl; None if it is not installed."""
    importlib.import_module("torch._dynamo")  # it would take the stand-in for torchvision
    names = ("", ".models", ".models.resnet", ".transforms", ".datasets")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        sys.modules.update({f"torchvision{n}": _Absent(f"torchvision{n}") for n in names})
    try:
        return importlib.import_module("easyfsl.methods")
    except ImportError:
        return None


class Tasks(NamedTuple):
    """Support [T, S, D], its labels [T, S], and queries [T, Q, D]."""

    support: Tensor
    labels: Tensor
    query: Tensor

    @classmethod
    def draw(cls, tasks: int, ways: int, shots: int, queries: int, width: int) -> Tasks:
        """Clusters that overlap, rectified as the features of a network are."""
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(tasks, ways, width, generator=generator)
        support, query = (
            means[:, torch.arange(count) % ways]
            + 2.5 * torch.randn(tasks, count, width, generator=generator)
            for count in (ways * shots, queries)
        )
        labels = torch.arange(ways).repeat(shots).expand(tasks, -1).contiguous()
        return cls(support.relu(), labels, query.relu())


def peer_logits(methods: ModuleType, pair: Pair, tasks: Tasks) -> Tensor:
    """Logits of easyfsl, task by task."""
    logits = []
    for support, labels, query in zip(*tasks, strict=True):
        method = getattr(methods, str(pair.peer))(feature_normalization=2)
        method.process_support_set(support, labels)
        logits.append(method(query))
    return torch.stack(logits)


def row(name: str, pair: Pair, methods: ModuleType | None, tasks: Tasks, rounds: int) -> list[str]:
    """The cells of a head."""
    first = Tasks(*(x[:THEIR_TASKS] for x in tasks))
    calls: dict[str, Callable[[], object]] = {OURS: lambda: pair.head(*tasks)}
    if methods is not None and pair.peer:
        calls[THEIRS] = lambda: peer_logits(methods, pair, first)
    taken = interleave(calls, rounds)
    ours = [seconds / len(tasks.query) for seconds in taken[OURS]]
    cells = [name, f"{1e3 * statistics.median(ours):.3f}", "", "", ""]
    if methods is not None and pair.peer:
        theirs = [seconds / len(first.query) for seconds in taken[THEIRS]]
        cells[2] = f"{1e3 * statistics.median(theirs):.3f}"
        cells[3] = f"{ratio(theirs, ours):.1f}"
        if pair.as_peer:
            error = pair.as_peer(pair.head(*first)) - peer_logits(methods, pair, first)
            cells[4] = f"{float(error.abs().max()):.1e}"
    return cells


def write_golden(path: Path, methods: ModuleType) -> None:
    """Logits of easyfsl on two tasks of 3 ways, 2 shots, 12 queries and 8 features."""
    tasks = Tasks.draw(2, 3, 2, 12, 8)
    arrays = {name: x.numpy() for name, x in tasks._asdict().items()}
    for name, pair in PAIRS.items():
        if pair.as_peer:
            arrays[name] = peer_logits(methods, pair, tasks).numpy()
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=32, help="tasks in a batch (default: 32)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", metavar="HEAD", choices=PAIRS)
    parser.add_argument("--golden", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = easyfsl_methods()
    if options.golden:
        if methods is None:
            parser.error("--golden needs easyfsl: pip install easyfsl")
        write_golden(options.golden, methods)
        return
    keep_freed_memory()
    tasks = Tasks.draw(options.tasks, 5, 5, 75, 640)
    print(f"1 thread, torch {torch.__version__}, {options.tasks} tasks a call\n")
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for name in options.only or PAIRS:
        print(line(row(name, PAIRS[name], methods, tasks, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
