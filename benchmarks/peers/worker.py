"""One contender in a process of its own: commands come by a pipe, a line of JSON each.

    python -m benchmarks.peers.worker

The first line names the contender; then come the commands "prepare", "check" and "time". Between
commands the process sleeps in a read. Output of libraries goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from benchmarks.common.workloads import WORKLOADS
from benchmarks.peers.contenders import Contender, prepared
from benchmarks.peers.step import Missing, Problem, Step


def use_threads(count: int) -> None:
    """Set the number of processors and threads of every framework, before any is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(count)


def timed(step: Step, calls: int) -> float:
    """Seconds of a number of steps. One step before them wakes the threads, unless it is long."""
    if calls > 1:
        step.run()
    step.wait()
    begun = time.perf_counter()
    for _ in range(calls):
        step.run()
    step.wait()
    return time.perf_counter() - begun


class Worker:
    """The commands, as methods that take and return what JSON can carry."""

    def __init__(
        self, contender: dict[str, Any], workload: str, data: str, device: str, threads: int
    ) -> None:
        use_threads(threads)
        self.contender = Contender(**contender)
        self.workload, self.data, self.device = workload, data, device

    def prepare(self) -> dict[str, Any]:
        """Builds the step and runs it once, which compiles what is to be compiled."""
        with np.load(self.data) as arrays:
            problem = Problem(
                WORKLOADS[self.workload], dict(arrays), self.device, self.contender.dtype
            )
        self.step = prepared(self.contender, problem)
        self.step.run()
        self.step.wait()
        return {"facts": dict(self.step.facts), "flops": self.step.flops}

    def check(self, to: str) -> dict[str, Any]:
        """Writes the result of a step."""
        result = self.step.run()
        self.step.wait()
        np.savez(to, **self.step.read(result))
        return {}

    def time(self, calls: int) -> dict[str, Any]:
        return {"seconds": timed(self.step, calls)}


def _attempt(call: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Call the function; returns its result or its error, which the driver puts into the table."""
    try:
        return call(**arguments)
    except (Missing, ImportError) as error:
        return {"status": "missing", "reason": str(error)}
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def serve(commands: TextIO, replies: TextIO) -> None:
    worker = Worker(**json.loads(commands.readline()))
    for line in commands:
        arguments = json.loads(line)
        reply = _attempt(getattr(worker, arguments.pop("do")), arguments)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
