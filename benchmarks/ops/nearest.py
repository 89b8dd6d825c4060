"""nearest beside faiss, cdist, pairwise_distance, and the plain matrix product: time and memory.

    python -m benchmarks.ops.nearest
    python -m benchmarks.ops.nearest --threads 2 --rounds 11

Prints a table in Markdown: milliseconds of `fm.nearest`, and how many times as long each other one
takes. All are float32 on a CPU and take turns. `faiss` is the search of `faiss.IndexFlatL2`, with
its index built before; its columns are empty where faiss is not installed. `cdist` and `distances`
have a minimum, or for k > 1 a topk, behind them; `product` is x y' alone, into a matrix that is
there. Memory is the growth of the process's peak by one call, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fastmeta as fm
from fastmeta.training.timing import interleave, ratio

try:
    import faiss
except ImportError:
    faiss = None

OURS = "fastmeta"
OTHERS = ("faiss", "cdist", "distances", "product")

# Q, N, D
SHAPES = [(65_536, 1_024, 128), (20_000, 10_000, 512), (4_096, 1_024, 64)]
NEIGHBOURS = (1, 5)

Call = Callable[[], object]


def rows(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    q, n, d = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(q, d, generator=generator), torch.randn(n, d, generator=generator)


def least(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(distance.min(1) if k == 1 else distance.topk(k, largest=False))


def calls(x: Tensor, y: Tensor, k: int) -> dict[str, Call]:
    """The contenders, ours first."""
    found: dict[str, Call] = {OURS: lambda: fm.nearest(x, y, k)}
    if faiss is not None:
        index = faiss.IndexFlatL2(y.shape[1])
        index.add(y.numpy())
        found["faiss"] = lambda: index.search(x.numpy(), k)
    found["cdist"] = lambda: least(torch.cdist(x, y), k)
    found["distances"] = lambda: least(fm.pairwise_distance(x, y), k)
    matrix: list[Tensor] = []

    def product() -> Tensor:
        if not matrix:
            matrix.append(x.new_empty(len(x), len(y)))
        return torch.mm(x, y.T, out=matrix[0])

    found["product"] = product
    return found


def growth(shape: tuple[int, int, int], k: int, name: str) -> int:
    """Bytes by which a call raises the peak of a fresh process, warmed up on a few rows."""
    code = (
        "from benchmarks.ops.nearest import *\n"
        "from benchmarks.ops.prototype_loss import peak_memory\n"
        f"torch.set_num_threads({torch.get_num_threads()}); x, y = rows({shape})\n"
        f"calls(x[:100].clone(), y, {k})[{name!r}]()\n"
        f"call = calls(x, y, {k})[{name!r}]; before = peak_memory(); out = call()\n"
        "print(peak_memory() - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return int(output.stdout)


def line(shape: tuple[int, int, int], k: int, rounds: int) -> str:
    x, y = rows(shape)
    seconds = interleave(calls(x, y, k), rounds)
    mine = seconds[OURS]
    times = [f"{ratio(seconds[name], mine):.2f}" if name in seconds else "" for name in OTHERS]
    return cells(shape, k, f"{1e3 * statistics.median(mine):.3g}", *times)


def memory_line(shape: tuple[int, int, int], k: int) -> str:
    names = [OURS, *(name for name in OTHERS if name != "faiss" or faiss is not None)]
    sizes = {name: f"{growth(shape, k, name) / 1e6:.1f}" for name in names}
    return cells(shape, k, *(sizes.get(name, "") for name in (OURS, *OTHERS)))


def cells(shape: tuple[int, int, int], k: int, *rest: str) -> str:
    return f"| {', '.join(map(str, shape))} | {k} | {' | '.join(rest)} |"


def table(title: str, lines: list[str]) -> str:
    head = f"| Q, N, D | k | {title} | {' | '.join(OTHERS)} |"
    return "\n".join([head, "| --- " * (3 + len(OTHERS)) + "|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if faiss is not None:
        faiss.omp_set_num_threads(options.threads)
    cases = [(shape, k) for shape in SHAPES for k in NEIGHBOURS]
    print(
        f"float32, {options.threads} threads, {options.rounds} rounds, torch {torch.__version__}, "
        f"faiss {'not installed' if faiss is None else faiss.__version__}, "
        f"nearest: {fm.backend_of('nearest')}\n"
    )
    lines = [line(shape, k, options.rounds) for shape, k in cases]
    print(table("fastmeta, ms", lines))
    if not options.no_memory:
        print("\nPeak memory of a call, MB\n")
        print(table("fastmeta", [memory_line(shape, k) for shape, k in cases]))


if __name__ == "__main__":
    main()
