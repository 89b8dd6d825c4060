"""The driver's side of a worker process: start, commands and end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.workloads import Arrays
from benchmarks.gpu.machine import ROOT
from benchmarks.peers.contenders import Contender

LIMIT = 900.0  # seconds that any one command may take; compiling takes minutes
ENVIRONMENT = ROOT / ".venv-bench" / "bin" / "python"


class Unable(Exception):
    """Raised if a contender cannot continue. `status` is "missing" or "failed"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def python() -> str:
    """The peers' own environment if it has been made (`make bench-env`), else this python."""
    return str(ENVIRONMENT) if ENVIRONMENT.exists() else sys.executable


class Process:
    """A worker process for one contender and workload, whose numbers lie in `folder`."""

    def __init__(
        self,
        contender: Contender,
        workload: str,
        folder: Path,
        device: str,
        threads: int,
        limit: float = LIMIT,
    ) -> None:
        self.contender, self.limit = contender, limit
        self._result = folder / f"{contender.name}.npz"
        self._log = folder / f"{contender.name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python(), "-m", "benchmarks.peers.worker"],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log},
                text=True,
                cwd=ROOT,
                env=_environment(device),
            )
        self._send(
            contender=asdict(contender),
            workload=workload,
            data=str(folder / "data.npz"),
            device=device,
            threads=threads,
        )

    def prepare(self) -> dict[str, Any]:
        """Facts, and the operations of a step if the workload does not give them."""
        return self._ask(do="prepare")

    def check(self) -> Arrays:
        self._ask(do="check", to=str(self._result))
        with np.load(self._result) as arrays:
            result = dict(arrays)
        self._result.unlink()
        return result

    def time(self, calls: int) -> float:
        return self._ask(do="time", calls=calls)["seconds"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading its reply says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _ask(self, **command: Any) -> dict[str, Any]:
        late = threading.Event()
        timer = threading.Timer(self.limit, lambda: (late.set(), self._process.kill()))
        timer.start()
        try:
            self._send(**command)
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise Unable("failed", f"{command['do']} took more than {self.limit:.0f} s")
        if not line:
            raise Unable("failed", self._last_words())
        reply = json.loads(line)
        if "status" in reply:
            raise Unable(reply["status"], reply["reason"])
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1] if lines else 'no message'}"


def _environment(device: str) -> Mapping[str, str]:
    """Keep JAX off a GPU that is not measured, and from reserving all memory of one that is."""
    if device == "cpu":
        return {**os.environ, "JAX_PLATFORMS": "cpu"}
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
