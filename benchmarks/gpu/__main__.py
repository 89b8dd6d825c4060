"""Builds, checks, measures and tests fastmeta on a machine with a GPU.

    python -m benchmarks.gpu          runs everything; what `make gpu` does
    python -m benchmarks.gpu keep     copies its results to benchmarks/results/<gpu>/
    python -m benchmarks.gpu table    prints the table of the kept results for docs/benchmarks.md

Everything goes to the folder $OUT (default build/gpu): report.json after every step, and what each
step printed. Exit code 0: nothing failed; 1: a step failed, was stopped or skipped; 2: this
machine cannot run it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu import machine, results
from benchmarks.gpu.runner import is_good, run_steps
from benchmarks.gpu.steps import BUDGET, all_steps


def run(out: Path, budget: float) -> int:
    if reason := machine.unfit():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no step outlives this
    facts = machine.describe()
    report = run_steps(all_steps(out, facts["capability"]), out, facts, budget)
    for name, step in report["steps"].items():
        reason = f" ({step['reason']})" if "reason" in step else ""
        print(f"{name:12} {step['status']}{reason}")
    return 0 if is_good(report) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "keep", "table"), default="run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    options = parser.parse_args()
    os.chdir(machine.ROOT)
    out = Path(os.environ.get("OUT") or "build/gpu").resolve()
    if options.command == "table":
        print(results.table(results.committed()))
        return 0
    if options.command == "keep":
        try:
            print(results.keep(out))
        except (OSError, ValueError) as error:
            sys.exit(f"benchmarks.gpu keep: {error}")
        return 0
    return run(out, options.budget)


if __name__ == "__main__":
    sys.exit(main())
