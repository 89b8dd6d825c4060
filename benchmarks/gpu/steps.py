"""The steps of `make gpu`: build, check of every kernel, benchmarks, sanitizers, tests.

What is worth most comes first: a run that ends early lacks what it can lack.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.gpu import outcomes
from benchmarks.gpu.machine import cuda_tool, has_module, python
from benchmarks.gpu.runner import Step

BUDGET = 460.0  # of the 8 minutes in all
WORKERS = 8  # test processes that share the GPU


def build(capability: str) -> Step:
    # --force, because an extension built without CUDA looks up to date.
    return Step(
        "build",
        python("setup.py", "build_ext", "--inplace", "--force"),
        share=150,
        output="build.txt",
        environment={
            "FASTMETA_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": capability,
            "MAX_JOBS": str(os.cpu_count()),
            # ninja lies beside the interpreter if both come from one environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        needed=True,
    )


def kernels() -> Step:
    """Compare every kernel with the CPU, in IEEE float32 and then in TF32."""
    return Step(
        "kernels",
        python("-m", "benchmarks.gpu.every_kernel", "--profile"),
        share=35,
        output="kernels.txt",
        read=outcomes.of_kernels,
    )


def benchmarks(out: Path) -> Step:
    return Step(
        "benchmarks",
        python("-m", "benchmarks.gpu.ops", "--json", str(out / "ops.json"), "--seconds", "110"),
        share=120,
        output="ops.txt",
        read=outcomes.of_benchmarks(out / "ops.json"),
    )


def sanitizer(tool: str, share: float = 30) -> Step:
    """Run one tool of compute-sanitizer over every kernel of fastmeta."""
    program = cuda_tool("compute-sanitizer")
    # Kernels that initcheck does not watch would leave memory that looks unwritten: it gets no
    # filter. PyTorch probes what a driver has; fastmeta checks each of its own launches.
    only_ours = [] if tool == "initcheck" else ["--kernel-name", "kns=fastmeta"]
    api_errors = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return Step(
        tool,
        [
            *(program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
            # Importing torch takes longer than the 10 s that it would wait for a first call.
            *(*only_ours, *api_errors, "--print-limit", "20", "--launch-timeout", "60"),
            *python("-m", "benchmarks.gpu.every_kernel"),
        ],
        share=share,
        output="sanitizers.txt",
        read=outcomes.of_sanitizer,
        # One allocation a tensor: with a cache, the memory after a tensor belongs to another one.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing="" if program else "compute-sanitizer was not found",
    )


def tests(out: Path) -> Step:
    """Run the tests that need a CUDA device; `on_device` selects them."""
    workers = min(WORKERS, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if has_module("xdist") else []
    return Step(
        "tests",
        python(
            *("-m", "pytest", "tests", "-p", "benchmarks.gpu.on_device", *parallel),
            *("--continue-on-collection-errors", f"--junitxml={out / 'tests.xml'}"),
        ),
        share=45,  # and what the steps before it leave
        output="tests.txt",
        read=outcomes.of_tests(out / "tests.xml"),
        environment={"OMP_NUM_THREADS": "2"},
    )


def all_steps(out: Path, capability: str) -> list[Step]:
    checks = [sanitizer("racecheck", 40), sanitizer("memcheck"), sanitizer("initcheck")]
    return [build(capability), kernels(), benchmarks(out), *checks, tests(out)]
