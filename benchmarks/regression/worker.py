"""One revision in a process of its own: commands come by a pipe, a line of JSON each.

    python -m benchmarks.regression.worker ROOT

The first reply names the package that was imported; then come the commands "prepare" and "time".
The workloads are the working tree's, the package is the one under ROOT. Output of libraries goes to
the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Step = Callable[[], object]


def import_package(root: Path) -> dict[str, Any]:
    """Import fastmeta from the folder; raises for any other one, or one without kernels."""
    sys.path.insert(0, str(root))
    import fastmeta as fm

    imported = Path(fm.__file__).resolve()
    if not imported.is_relative_to(root):
        raise ImportError(f"fastmeta: expected the package under {root}, got {imported}")
    info = fm.build_info()
    if not info["native"]:
        raise ImportError(f"fastmeta: expected compiled kernels in {root}, got {info['reason']}")
    return {"package": str(imported.parent), "torch": info["torch"], "isa": info["isa"]}


def seconds_of(step: Step, calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time a number of steps. One before them wakes the threads, unless a turn is one step."""
    if calls > 1:
        step()
    begun = clock()
    for _ in range(calls):
        step()
    return clock() - begun


class Worker:
    """The commands, as methods that take and return what JSON can carry."""

    def __init__(self, workloads: dict[str, Callable[[], Step]]) -> None:
        self.workloads = workloads

    def prepare(self, workload: str) -> dict[str, Any]:
        """Build the step and run it twice, which fills the caches of its plans."""
        self.step = self.workloads[workload]()
        self.step()
        self.step()
        return {}

    def time(self, calls: int) -> dict[str, Any]:
        return {"seconds": seconds_of(self.step, calls)}


def attempt(call: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Run a command; returns its reply or its error, which the driver reports."""
    try:
        return call(**arguments)
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {"error": f"{type(error).__name__}: {first}"}


def serve(worker: Worker, commands: TextIO, replies: TextIO) -> None:
    for line in commands:
        arguments = json.loads(line)
        reply = attempt(getattr(worker, arguments.pop("do")), **arguments)
        print(json.dumps(reply), file=replies, flush=True)


def main(root: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    hello = attempt(import_package, root=Path(root).resolve())
    print(json.dumps(hello), file=replies, flush=True)
    if "error" in hello:
        return
    from benchmarks.regression.workloads import WORKLOADS

    serve(Worker(WORKLOADS), sys.stdin, replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
