"""What setup.py builds the extension from, and where."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from tools.ninja_build import BuildError

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def planned(kind: str) -> tuple[str, ...]:
    """The values of a kind in `setup.py plan` without CUDA: `flag` for g++, `nvcc_flag`, ...

    Raises BuildError if setup.py has no plan.
    """
    plan = subprocess.run(
        [sys.executable, "setup.py", "plan"],
        cwd=ROOT,
        env={**os.environ, "FASTMETA_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if plan.returncode != 0:
        raise BuildError(f"setup.py plan failed:\n{plan.stderr}")
    words = (line.split(" ", 1) for line in plan.stdout.splitlines())
    return tuple(value for name, value in words if name == kind)
