"""The driver's side of a worker process: start, commands and end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT


class Failed(Exception):
    """Failure of a revision to reply; the message says which revision and why."""


class Process:
    """One revision, whose package lies under `root`, in a process that outlives its workloads."""

    def __init__(
        self, name: str, root: Path, threads: int, command: Sequence[str] | None = None
    ) -> None:
        self.name = name
        worker = (sys.executable, "-m", "benchmarks.regression.worker", str(root))
        counts = {variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            command or worker,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **counts},
        )
        try:
            self.facts = self._reply("its start")
        except Failed:
            self.close()
            raise

    def prepare(self, workload: str) -> None:
        self._ask(do="prepare", workload=workload)

    def time(self, calls: int) -> float:
        return self._ask(do="time", calls=calls)["seconds"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, **command: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading its reply says so
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._reply(command["do"])

    def _reply(self, to: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise Failed(f"{self.name}: expected a reply to {to}, got exit code {code}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(f"{self.name}: expected a reply to {to}, got {reply['error']}")
        return reply
