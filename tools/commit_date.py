"""The date of the commit, which chooses what a daily run of the tests leaves to other days."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def date_of_commit() -> str:
    """Year, month and day; empty outside of a repository."""
    command = ["git", "log", "-1", "--format=%cs"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
