"""Every example runs as its reader would run it: from a folder of its own, without options.

With ``FASTMETA_EXAMPLES_PYTHON`` the Python of another environment runs them, such as one that
the wheel was installed into.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
PYTHON = os.environ.get("FASTMETA_EXAMPLES_PYTHON", sys.executable)
SKIPPED = 77  # what an example exits with where the machine lacks what it needs, such as a GPU


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTMETA_BACKEND")
    }
    environment["OMP_NUM_THREADS"] = "1"
    if sys.executable == PYTHON:  # the sources, which need not be installed
        environment["PYTHONPATH"] = str(EXAMPLES.parent)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    shutil.copy(EXAMPLES / script, tmp_path)
    done = run([PYTHON, script], tmp_path)
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_lines_of_an_example_say_how_to_run_it(script):
    text = (EXAMPLES / script).read_text()
    assert re.match(rf'"""[^"]+{re.escape(script)}', text), "its docstring shows the command"
