"""The command that runs the CUDA kernels on the CPU, where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_emulation.build import ROOT


def command(path: Path) -> subprocess.CompletedProcess:
    """`python -m tests.cuda_emulation` with nothing but `path` on PATH."""
    return subprocess.run(
        [sys.executable, "-m", "tests.cuda_emulation"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.rotating
def test_without_a_compiler_it_says_so(tmp_path):
    process = command(tmp_path)
    assert process.returncode == 3
    assert "fastmeta: the CUDA kernels were not emulated: g++ is not on PATH\n" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.rotating
def test_without_sanitizers_it_says_so(tmp_path):
    """g++ answers with the bare name of a library that it does not have."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho libasan.so\n")
    compiler.chmod(0o755)
    process = command(tmp_path)
    assert process.returncode == 3
    assert "g++ has no libasan.so; install its sanitizers" in process.stderr
