"""Builds the emulator and runs the tests of the CUDA kernels in it.

    python -m tests.cuda_emulation         # each test in one order of threads, and the mutants
    python -m tests.cuda_emulation --full  # in all three orders: what a release must pass
    python -m tests.cuda_emulation --share 4  # a fourth of the tests, and the mutants that they see
    python -m tests.cuda_emulation --order shuffled tests/ops/test_every_op.py -k cosine

The date of the commit and a test's name choose its order, so another day tries another one. It
chooses the share of the tests, too. Tests of something else than values run on a third of the days.

Exit status: 0 all passed; 1 something failed; 3 this machine cannot build the emulator.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tests.cuda_emulation.build import BUILD, ROOT, build, sanitizer_libraries
from tests.cuda_emulation.mutants import PREFIX, all_mutants
from tests.cuda_emulation.records import read
from tests.cuda_emulation.settings import MIXED, ORDERS, Settings
from tools.commit_date import date_of_commit
from tools.ninja_build import BuildError

CANNOT_RUN = 3
TESTS_FAILED = 1  # pytest's exit status
HERE = "tests/cuda_emulation"
KERNEL_TESTS = [
    "tests/ops/test_every_op.py",
    "tests/ops/test_boundaries.py",
    "tests/ops/test_large_tiles.py",
    "tests/ops/test_nearest.py",
    "tests/ops/test_task_batch_norm.py",
    "tests/ops/test_activation.py",
    "tests/ops/test_pair_scores.py",
    "tests/ops/test_pair_pool.py",
    f"{HERE}/test_runtime.py",
    f"{HERE}/test_task_program.py",
    f"{HERE}/test_task_program_images.py",
    f"{HERE}/test_task_conv.py",
    f"{HERE}/test_grid_steps.py",
]


# In the natural order also what does not depend on the order. 2^31 elements take too long one by
# one: test_runtime.py has its own way. Finite differences call the kernels of the other tests,
# hundreds of times.
TESTS = [*KERNEL_TESTS, "tests/ops/test_edges.py", f"{HERE}/test_emulator.py"]
TESTS += [f"{HERE}/{name}.py" for name in ("test_checked_labels", "test_block_plans")]
TESTS += [f"{HERE}/test_launches.py", f"{HERE}/test_mutants.py"]
TESTS += ["-k", "not 2_to_the_31_e and not finite_differences"]
TESTS_OF_ORDER = [
    *KERNEL_TESTS,
    "-k",
    "float64_reference or boundaries or large_tiles or runtime or task_program"
    " or task_conv or task_batch_norm or activation or grid_steps or pair_scores or pair_pool",
]
PLANTED_BUG = "test_a_planted_bug_is_found|test_undefined_behaviour_stops"
RECORDS = BUILD / "records"


@dataclass(frozen=True)
class Run:
    """A pytest process that emulates."""

    name: str
    settings: Settings
    arguments: list[str] = field(default_factory=lambda: TESTS)

    def command(self) -> list[str]:
        plugin = ["-p", "tests.cuda_emulation.plugin"]
        return [sys.executable, "-m", "pytest", *plugin, *self.arguments]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.settings.environment(),
            "LD_PRELOAD": ":".join(sanitizer_libraries()),
            # Leaks are Python's own. Freed memory is given out again soon: fresh pages take time.
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16:malloc_context_size=1",
            "OMP_NUM_THREADS": "1",
            # Where emulated tensors are, PyTorch's kernels may take the place of ours.
            "FASTMETA_BACKEND": "native",
        }

    def finish(self) -> int:
        """Its exit status; prints how it went."""
        start = time.monotonic()
        process = subprocess.run(
            self.command(),
            env=self.environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code = process.returncode
        print(process.stdout if code else process.stdout.splitlines()[-1])
        verdict = f"failed with status {code}" if code else "passed"
        print(f"{self.name}: {verdict} in {time.monotonic() - start:.0f} s", flush=True)
        return code


def split(name: str, arguments: list[str], settings: Settings, share: int = 1) -> list[Run]:
    """A run for each processor, of one in `share` tests."""
    count = os.cpu_count() or 1
    first = zlib.crc32(settings.date.encode()) % share * count
    return [
        Run(
            f"{name} {i + 1} of {count}",
            replace(settings, shard=first + i, shards=share * count, name=f"{name}-{i}.json"),
            arguments,
        )
        for i in range(count)
    ]


def runs_of_tests(full: bool, share: int) -> list[Run]:
    settings = Settings(records=str(RECORDS))
    if not full:
        mixed = replace(settings, order=MIXED, date=date_of_commit())
        return split(f"tests of {mixed.date}", TESTS, mixed, share)
    return [
        run
        for order in ORDERS
        for run in split(
            f"{order} order",
            TESTS if order == "natural" else TESTS_OF_ORDER,
            replace(settings, order=order),
        )
    ]


def outcome(pattern: str) -> tuple[int, int]:
    """How many tests on record the pattern finds, and how many of them passed."""
    found = [record.passed for record in read(RECORDS) if re.search(pattern, record.test)]
    return len(found), sum(found)


def hunt_failed(codes: list[int], share: int) -> bool:
    """Whether the runs of mutants, with these exit statuses, count as a failure.

    All tests must catch every mutant. A share of them sees barriers that only others can judge, so
    there one mutant in ten may survive.
    """
    if share == 1:
        return any(codes)
    tried, caught = outcome(PREFIX)
    return any(code not in (0, TESTS_FAILED) for code in codes) or caught < 0.9 * tried


def run_all(full: bool, share: int) -> int:
    """Runs the tests, then the mutants on those that can see them; prints what was caught."""
    shutil.rmtree(RECORDS, ignore_errors=True)
    hunt = Settings(records=str(RECORDS), mutants=True, is_partial=share > 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = any([*pool.map(Run.finish, runs_of_tests(full, share))])
        failed |= hunt_failed([*pool.map(Run.finish, split("mutants", TESTS, hunt))], share)
    name = "full run" if full else f"a run of 1 in {share} tests" if share > 1 else "daily run"
    mutants, bugs = (
        f"{tried} tried, {caught} caught" for tried, caught in map(outcome, (PREFIX, PLANTED_BUG))
    )
    print(f"{name}: {len(all_mutants())} mutants, {mutants}; planted bugs in three orders, {bugs}")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_emulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="every test in all three orders")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="one in N tests")
    parser.add_argument("--order", choices=ORDERS, default="natural", help="of one run by itself")
    options, arguments = parser.parse_known_args()
    try:
        sanitizer_libraries()
        start = time.monotonic()
        build()
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    except RuntimeError as error:
        print(f"fastmeta: the CUDA kernels were not emulated: {error}", file=sys.stderr)
        return 1 if isinstance(error, BuildError) else CANNOT_RUN
    if arguments:
        run = Run("tests", Settings(order=options.order), arguments)
        return subprocess.run(run.command(), env=run.environment(), cwd=ROOT).returncode
    return run_all(options.full, options.share)


if __name__ == "__main__":
    sys.exit(main())
