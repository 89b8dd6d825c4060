"""mypy's strict mode passes on the package, and tells a program what the package promises."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USER = "tests/helpers/typed_user.py"

pytestmark = pytest.mark.timeout(900)  # mypy's first run reads all of torch


def check(*what: str) -> str:
    pytest.importorskip("mypy", reason="mypy is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *what], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_the_whole_package_is_typed():
    assert "Success" in check()


def test_a_program_gets_the_types_that_it_is_promised():
    assert "Success" in check(USER)


def test_a_wrong_use_is_found(tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(
        "import torch\nimport fastmeta as fm\n"
        "fm.prototypes(torch.zeros(3, 2), [0, 1, 1], 2)\n"
        "learner: int = fm.MAML(torch.nn.Linear(1, 1)).clone()\n"
    )
    found = check(os.fspath(program))
    assert 'wrong.py:3: error: Argument 2 to "prototypes"' in found
    assert "wrong.py:4: error: Incompatible types" in found


def test_the_typed_program_runs():
    runpy.run_path(os.fspath(ROOT / USER))
