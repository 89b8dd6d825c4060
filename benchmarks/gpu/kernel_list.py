"""The kernels that `benchmarks.gpu.every_kernel` launches on an H200, by their full names.

kernels.txt has one a line, with all arguments of its template. A test in the emulator makes the
list anew and compares; `python -m tools.cuda_check` looks for each name in what nvcc compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PATH = Path(__file__).resolve().with_name("kernels.txt")
MULTIPROCESSORS = 132  # of an H200; the choice of tiles depends on them


def as_text(names: Iterable[str]) -> str:
    return "".join(f"{name}\n" for name in sorted(names))


def listed() -> set[str]:
    return set(PATH.read_text().splitlines())


def expected(multiprocessors: int) -> set[str]:
    """The names that a device with so many multiprocessors must launch.

    Another device than an H200 has other tiles: then only the names without arguments are sure.
    """
    if multiprocessors == MULTIPROCESSORS:
        return listed()
    return {name.partition("<")[0] for name in listed()}
