"""Requirements of `make gpu` on a machine, and the machine's description in its report."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Environment variables that decide about precision or speed.
DECISIVE = (
    *("FASTMETA_BACKEND", "FASTMETA_ISA", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS"),
)


def cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [f"{CUDA_HOME}/bin", f"{CUDA_HOME}/{name}"] if CUDA_HOME else []
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def unfit() -> str:
    """The reason why this machine cannot run the kernels; empty if it can."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed for {sys.executable}"
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return (
        "" if cuda_tool("nvcc") else "there is no nvcc; install the CUDA toolkit or set CUDA_HOME"
    )


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> dict[str, Any]:
    """The commit and whether files differ from it; FASTMETA_COMMIT names it outside of a clone."""
    named = os.environ.get("FASTMETA_COMMIT")
    if named:
        return {"commit": named, "dirty": None}
    changes = output_of("git", "status", "--porcelain")
    return {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def versions() -> dict[str, str | None]:
    import torch

    nvcc = re.search(r"V([\d.]+)", output_of(cuda_tool("nvcc") or "nvcc", "--version") or "")
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc and nvcc[1],
        "driver": output_of(*query),
    }


def settings() -> dict[str, Any]:
    """Settings besides versions that decide about precision and speed."""
    import torch

    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "environment": {name: os.environ[name] for name in DECISIVE if name in os.environ},
    }


def describe() -> dict[str, Any]:
    """Describe the GPU, date, commit, versions and settings, for the head of the report."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "cpu_cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "versions": versions(),
        "settings": settings(),
    }


def has_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def python(*arguments: str) -> Sequence[str]:
    return (sys.executable, *arguments)
