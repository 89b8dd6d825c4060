"""The CUDA sources with one barrier removed, to see whether the emulator misses it.

Each mutant is a library of all kernels, of which only those with the barrier are compiled again.
Loaded before the ops, its launchers are called instead of theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_emulation.build import BUILD, KERNEL, ROOT, RULES, library, objects
from tools.ninja_build import run_ninja

CSRC = ROOT / "csrc"
KERNELS = [path.relative_to(CSRC) for path in sorted(CSRC.rglob("*.cu"))]
BARRIER = re.compile(r"^ *__sync(threads|warp)\(.*\);\n", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A source without one of its barriers, which is on `line`."""

    source: Path
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.read_text().count("\n", 0, self.start) + 1

    @property
    def library(self) -> Path:
        return BUILD / "mutants" / f"{self.source.name}-{self.line}.so"

    def build(self) -> None:
        folder = self.library.with_suffix("")
        place = self.source.relative_to(CSRC)
        text = self.source.read_text()
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text[: self.start] + "\n" + text[self.end :])
        changed = [path for path in KERNELS if place in included(path)]
        flags = [f"-I{folder}", *KERNEL]
        unchanged = [CSRC / path for path in changed if path != place]
        compiled = objects(unchanged, CSRC, flags)
        if place in changed:
            compiled += objects([folder / place], folder, flags)
        kept = [path for path in KERNELS if path not in changed]
        inputs = [*(edge.output for edge in compiled), *(str(BUILD / f"{path}.o") for path in kept)]
        emulator = [f"-L{BUILD}", "-lemulator", f"-Wl,-rpath,{BUILD}"]
        run_ninja(folder, RULES, [*compiled, library(str(self.library), inputs, emulator)])

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}"


def included(path: Path) -> set[Path]:
    """The sources of csrc/ that one of them consists of."""
    direct = re.findall(r'^#include "(.+)"', (CSRC / path).read_text(), re.MULTILINE)
    return {path}.union(*(included(Path(name)) for name in direct))


def all_mutants() -> list[Mutant]:
    return [
        Mutant(path, found.start(), found.end())
        for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")])
        for found in BARRIER.finditer(path.read_text())
    ]
