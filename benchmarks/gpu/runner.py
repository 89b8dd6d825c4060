"""Runs steps one after the other within a budget of time, and keeps a report of them on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

GOOD = ("passed", "not available")
LEAST = 5.0  # seconds below which a step is not begun, unless its own share is smaller


@dataclass(frozen=True)
class Outcome:
    """Status of a step (passed, failed, timed out, skipped, not available), with its findings."""

    status: str
    summary: Mapping[str, Any] = field(default_factory=dict)


def by_exit_code(code: int, output: str) -> Outcome:
    return Outcome("passed" if code == 0 else "failed", {"exit_code": code})


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    share: float  # seconds of the budget that no other step can use up
    output: str  # file that what it prints is appended to
    read: Callable[[int, str], Outcome] = by_exit_code  # of exit code and output
    environment: Mapping[str, str] = field(default_factory=dict)
    needed: bool = False  # nothing after it makes sense without it
    missing: str = ""  # why it cannot run on this machine


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended by itself


def run_command(
    command: Sequence[str], environment: Mapping[str, str], limit: float, log: TextIO
) -> tuple[int, str, bool]:
    """Run a command; at `limit` seconds it is stopped with all processes that it started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        preexec_fn=os.setpgrp,
    )
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), _kill_group(process)))
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
            lines.append(line)
        process.wait()
    finally:
        timer.cancel()
        _kill_group(process)
        process.wait()
    return process.returncode, "".join(lines), late.is_set()


def run_step(step: Step, limit: float, out: Path) -> Outcome:
    with (out / step.output).open("a") as log:
        log.write(f"$ {' '.join(step.command)}\n")
        log.flush()
        try:
            code, output, late = run_command(step.command, step.environment, limit, log)
        except OSError as error:
            return Outcome("failed", {"reason": str(error)})
    outcome = step.read(code, output)
    if late:
        reason = f"stopped after {limit:.0f} s"
        return Outcome("timed out", {**outcome.summary, "reason": reason})
    return outcome


def seconds_for(steps: Sequence[Step], number: int, left: float) -> float:
    """Seconds that a step may take: all that is left, less the shares of the steps after it."""
    later = sum(step.share for step in steps[number + 1 :])
    return max(left - later, min(steps[number].share, left))


def _outcome_of(step: Step, seconds: float, failed: str, out: Path) -> Outcome:
    if failed:
        return Outcome("skipped", {"reason": f"{failed} did not pass"})
    if step.missing:
        return Outcome("not available", {"reason": step.missing})
    if seconds < min(LEAST, step.share):
        return Outcome("skipped", {"reason": f"{max(seconds, 0):.0f} s of the budget were left"})
    return run_step(step, seconds, out)


def run_steps(
    steps: Sequence[Step], out: Path, facts: Mapping[str, Any], budget: float
) -> dict[str, Any]:
    """Run all steps and write `out`/report.json after each; returns the report."""
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in {step.output for step in steps}:
        (out / name).unlink(missing_ok=True)
    report = {**facts, "budget_s": budget, "steps": {s.name: {"status": "not run"} for s in steps}}
    write_json(out / "report.json", report)
    failed = ""
    for number, step in enumerate(steps):
        started = time.monotonic()
        print(f"== {step.name}", flush=True)
        seconds = seconds_for(steps, number, budget - (started - begun))
        outcome = _outcome_of(step, seconds, failed, out)
        took = round(time.monotonic() - started, 2)
        report["steps"][step.name] = {"status": outcome.status, "seconds": took, **outcome.summary}
        print(f"== {step.name}: {outcome.status}, {took} s", flush=True)
        failed = failed or (step.name if step.needed and outcome.status != "passed" else "")
        write_json(out / "report.json", report)
    return report


def is_good(report: Mapping[str, Any]) -> bool:
    return all(step["status"] in GOOD for step in report["steps"].values())
