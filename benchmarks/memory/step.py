"""Peak memory of a step, of fastmeta and of the libraries that loop over tasks.

    python -m benchmarks.memory.step omni_conv1 omni_conv5 mini_conv5

Each runs in its own process of the peers' environment. The peak is the kernel's count of resident
pages (VmHWM), which is reset after the step is built; it includes the needs of the first run.
Linux only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.common.workloads import WORKLOADS, draw
from benchmarks.peers.contenders import CONTENDERS, OURS, prepared
from benchmarks.peers.process import python
from benchmarks.peers.step import Problem

NAMES = (OURS, "learn2learn", "higher", "torchopt")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of this process, "VmRSS" now or "VmHWM" at most."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def peak_of_a_step(workload: str, name: str) -> int:
    """Bytes, in this process."""
    contender = next(c for c in CONTENDERS if c.name == name and c.kind == "meta")
    step = prepared(contender, Problem(WORKLOADS[workload], draw(WORKLOADS[workload])))
    RESET.write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    step.run()
    return resident("VmHWM") - before


def main(arguments: list[str]) -> None:
    if arguments[0] == "--one":
        print(peak_of_a_step(*arguments[1:]))
        return
    for workload in arguments:
        print(f"{workload}: {WORKLOADS[workload]}")
        for name in NAMES:
            command = [python(), "-m", "benchmarks.memory.step", "--one", workload, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"  {name:12} {int(done.stdout.split()[-1]) / 2**20:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
