"""No barrier of the kernels can go without being missed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.cuda_emulation.emulator import MUTANT
from tests.cuda_emulation.mutants import Mutant, all_mutants

MISSED = re.compile("with no barrier between|which no thread has written")


def test_there_are_barriers_to_remove():
    assert len(all_mutants()) >= 8


@pytest.mark.parametrize("mutant", all_mutants(), ids=str)
def test_a_missing_barrier_is_found(mutant: Mutant):
    mutant.build()
    environment = {**os.environ, MUTANT: str(mutant.library)}
    environment["LD_PRELOAD"] += f":{mutant.library}"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.cuda_emulation.plugin"]
    # The barrier before the first tile matters where rows have no features, so no tile.
    command += ["tests/test_ops.py", "tests/cuda_emulation/test_runtime.py"]
    command += ["-k", "(float64_reference and torch.float32) or no_launch_has_no_blocks"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1, process.stdout + process.stderr
    assert MISSED.search(process.stdout), process.stdout
