"""No barrier of the kernels can go without being missed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.cuda_emulation.emulator import MUTANT
from tests.cuda_emulation.mutants import CSRC, Mutant, all_mutants

# Every barrier matters in one of these: the one before the first tile where rows have no features,
# so no tile; those around differences where products lose digits; those of small tiles where rows
# are longer than a tile is deep.
TESTS = [
    "tests/ops/test_every_op.py",
    "tests/ops/test_large_tiles.py",
    "tests/cuda_emulation/test_runtime.py",
]
PROGRAM_TESTS = [
    "tests/cuda_emulation/test_task_program.py",
    "tests/cuda_emulation/test_task_program_images.py",
]
PROGRAM_ROOMS = ("execution", "convolution", "task_program")
SELECTED = (
    "(float64_reference and torch.float32) or keep_their_digits or small_tiles_walk "
    "or no_launch_has_no_blocks or every_barrier"
)
# The emulator watches shared memory. What goes wrong in global memory shows in the values.
MISSED = re.compile(r"with no barrier between|which no thread has written|assert \S+ <= \(")


def test_there_are_barriers_to_remove():
    assert len(all_mutants()) >= 8


@pytest.mark.parametrize("mutant", all_mutants(), ids=str)
def test_a_missing_barrier_is_found(mutant: Mutant):
    mutant.build()
    environment = {**os.environ, MUTANT: str(mutant.library)}
    environment["LD_PRELOAD"] += f":{mutant.library}"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.cuda_emulation.plugin"]
    room = mutant.source.relative_to(CSRC).parts[0]
    tests = PROGRAM_TESTS if room in PROGRAM_ROOMS else TESTS
    command += [*tests, "-k", SELECTED]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1, process.stdout + process.stderr
    assert MISSED.search(process.stdout), process.stdout
