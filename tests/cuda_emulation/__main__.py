"""Builds the emulator and runs the tests of the CUDA kernels in it.

    python -m tests.cuda_emulation                                        # everything
    python -m tests.cuda_emulation --order shuffled tests/ops/test_every_op.py -k cosine

Exit status: 0 all passed; 1 something failed; 3 this machine cannot build the emulator.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.cuda_emulation.build import ROOT, build, sanitizer_libraries
from tests.cuda_emulation.emulator import ORDER, ORDERS
from tools.ninja_build import BuildError

CANNOT_RUN = 3
HERE = "tests/cuda_emulation"
KERNEL_TESTS = [
    "tests/ops/test_every_op.py",
    "tests/ops/test_boundaries.py",
    "tests/ops/test_large_tiles.py",
    "tests/ops/test_task_batch_norm.py",
    f"{HERE}/test_runtime.py",
    f"{HERE}/test_task_program.py",
    f"{HERE}/test_task_program_images.py",
    f"{HERE}/test_task_conv.py",
    f"{HERE}/test_grid_steps.py",
]


@dataclass(frozen=True)
class Run:
    """A pytest process in which blocks and threads run in one order."""

    name: str
    order: str
    arguments: list[str]

    def command(self) -> list[str]:
        plugin = ["-p", "tests.cuda_emulation.plugin"]
        return [sys.executable, "-m", "pytest", *plugin, *self.arguments]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            ORDER: self.order,
            "LD_PRELOAD": ":".join(sanitizer_libraries()),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "OMP_NUM_THREADS": "1",
        }


# Every op case in three orders; in the natural one also what does not depend on the order.
# 2^31 elements take too long one by one: test_runtime.py has its own way. Finite differences call
# the kernels of the other tests, hundreds of times.
RUNS = [
    Run("mutants", "natural", [f"{HERE}/test_mutants.py"]),
    Run(
        "natural",
        "natural",
        [
            *KERNEL_TESTS,
            "tests/ops/test_edges.py",
            f"{HERE}/test_emulator.py",
            "-k",
            "not 2_to_the_31_e and not finite_differences",
        ],
    ),
    *(
        Run(
            order,
            order,
            [
                *KERNEL_TESTS,
                "-k",
                "float64_reference or boundaries or large_tiles or runtime or task_program"
                " or task_conv or task_batch_norm or grid_steps",
            ],
        )
        for order in ("reversed", "shuffled")
    ),
]


def finish(run: Run) -> int:
    start = time.monotonic()
    process = subprocess.run(
        run.command(),
        env=run.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    verdict = "passed" if process.returncode == 0 else f"failed with status {process.returncode}"
    print(process.stdout if process.returncode else process.stdout.splitlines()[-1])
    print(f"{run.name}: {verdict} in {time.monotonic() - start:.0f} s", flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_emulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--order", choices=ORDERS, default="natural", help="of one run by itself")
    options, arguments = parser.parse_known_args()
    try:
        sanitizer_libraries()
        build()
    except RuntimeError as error:
        print(f"fastmeta: the CUDA kernels were not emulated: {error}", file=sys.stderr)
        return 1 if isinstance(error, BuildError) else CANNOT_RUN
    if arguments:
        run = Run("tests", options.order, arguments)
        return subprocess.run(run.command(), env=run.environment(), cwd=ROOT).returncode
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(finish, RUNS)) and 1


if __name__ == "__main__":
    sys.exit(main())
