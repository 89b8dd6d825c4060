"""Shares of a step's time, by samples of `perf` (Debian: linux-perf), on one thread.

    python -m benchmarks.peers.time_shares [--workload NAME ...] [--seconds S]

Products are matrix products with what is fused to them; other steps are all other compiled code of
fastmeta; Python is the interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common.workloads import WORKLOADS, draw
from benchmarks.peers.contenders import OURS, contenders_for, prepared
from benchmarks.peers.step import Problem

KINDS = ("products", "other steps", "Python", "PyTorch, C library")
SETTLED = 6.0  # seconds after which imports are over and samples begin

_LINE = re.compile(r"\s+([\d.]+)%\s+(\S+)\s+\[.\]\s+(.*)")
_PRODUCT = re.compile(r"sgemm|gemv|::tile<|::product<")


def run_steps(name: str, seconds: float) -> None:
    """Take steps of a workload for some seconds, and print the time of one."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    (contender,) = contenders_for(workload.kind, "cpu", [OURS])
    step = prepared(contender, Problem(workload, draw(workload)))
    step.run()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step.run()
        count += 1
    print((time.perf_counter() - begun) / count, flush=True)
    os._exit(0)  # the interpreter's own end is no step


def shares(name: str, seconds: float) -> dict[str, float]:
    """The share of each kind in the samples of a workload's steps."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "samples")
        command = [sys.executable, "-m", "benchmarks.peers.time_shares", "--steps-of", name]
        record = [
            "perf",
            "record",
            "-q",
            "-D",
            f"{SETTLED * 1000:.0f}",
            "-e",
            "cpu-clock",
            "-o",
            data,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*record, *command, "--seconds", str(SETTLED + seconds)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        report = ["perf", "report", "-i", data, "--stdio", "--no-children", "--sort", "dso,symbol"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    found = dict.fromkeys(KINDS, 0.0)
    for kind, percent in _samples(lines):
        found[kind] += percent
    return {kind: percent / sum(found.values()) for kind, percent in found.items()}


def _samples(report: str) -> Iterator[tuple[str, float]]:
    for line in report.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        percent, binary, symbol = match.groups()
        if _PRODUCT.search(symbol):
            kind = KINDS[0]
        elif "fastmeta" in symbol or binary.startswith("_C."):
            kind = KINDS[1]
        else:
            kind = KINDS[2] if "python" in binary else KINDS[3]
        yield kind, float(percent)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.time_shares")
    names = ["sin1_t1", "sin1", "sin5", "omni_mlp"]
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=names)
    parser.add_argument("--seconds", type=float, default=3.0, help="of samples; default 3")
    parser.add_argument("--steps-of", choices=WORKLOADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps_of:
        run_steps(options.steps_of, options.seconds)
    if shutil.which("perf") is None:
        print("there is no perf; on Debian: apt-get install linux-perf", file=sys.stderr)
        return 1
    print("| workload |", " | ".join(KINDS), "|")
    print("| --- |" + " --- |" * len(KINDS))
    for name in options.workload:
        found = shares(name, options.seconds).values()
        print(f"| {name} |", " | ".join(f"{share:.0%}" for share in found), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
