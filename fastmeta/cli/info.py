"""Information for a bug report: ``python -m fastmeta info``."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from fastmeta.core.backend import DTYPES, NAMES, backend_of, build_info
from fastmeta.core.version import VERSION

ENVIRONMENT = ("FASTMETA_", "CUDA_", "NCCL_", "OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_")

ALSO = ("CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")


def report() -> str:
    """Versions, build, machine, environment, and the backend of each op, as text.

    >>> print(report())
    fastmeta          0.1.0 in ...
    """
    rows = {
        "fastmeta": f"{VERSION} in {Path(__file__).parents[1]}",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch": torch.__version__,
        **_build(),
        "CPU": _cpu(),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "CUDA of torch": torch.version.cuda or "none",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "g++": _version(os.environ.get("CXX", "g++")),
        "nvcc": _version(_nvcc()),
        "environment": _environment(),
    }
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", _backend_table()])


def _build() -> dict[str, str]:
    info = build_info()
    if not info["native"]:
        return {"native kernels": f"none: {info['reason']}"}
    return {
        "native kernels": "CPU and CUDA" if info["cuda"] else "CPU",
        "compiled with": f"torch {info['torch']}, {info['compiler']}, for {info['isa']}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _nvcc() -> str:
    """Path of the nvcc that a build uses."""
    # The import would log that there is no GPU, which the report says itself.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.cpp_extension import CUDA_HOME

    return f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else "nvcc"


def _version(compiler: str) -> str:
    """Line with the version in the output of a compiler's ``--version``."""
    command = [*compiler.split(), "--version"]
    if not command[:-1] or shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return next((x for x in lines if "release" in x), lines[0] if lines else "does not run")


def _environment() -> str:
    chosen = (k for k in sorted(os.environ) if k.startswith(ENVIRONMENT) or k in ALSO)
    return " ".join(f"{name}={os.environ[name]}" for name in chosen) or "nothing set"


def _backend_table() -> str:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    columns = [(device, dtype) for device in devices for dtype in DTYPES]
    names = [str(dtype).removeprefix("torch.") for _, dtype in columns]
    heads = [f"{device} {name}" for (device, _), name in zip(columns, names, strict=True)]
    lines = ["".join(["op".ljust(19), *(f"{head:<15}" for head in heads)]).rstrip()]
    for op in NAMES:
        backends = (backend_of(op, torch.device(device), dtype) for device, dtype in columns)
        lines.append("".join([f"{op:<19}", *(f"{backend:<15}" for backend in backends)]).rstrip())
    return "\n".join(lines)
