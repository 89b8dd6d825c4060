"""A run over workloads: each measured, printed and saved before the next."""

from __future__ import annotations

import datetime
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.workloads import Workload, draw
from benchmarks.gpu.machine import DECISIVE, commit
from benchmarks.peers import results, tables
from benchmarks.peers.contenders import Contender, contenders_for
from benchmarks.peers.driver import Start, measure
from benchmarks.peers.process import Process, python


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    return match[1] if match else platform.processor() or platform.machine()


def facts(device: str, threads: int) -> dict[str, str]:
    """Machine, date, commit and settings; the workers add versions and precision."""
    state = commit()
    changed = " with changes" if state["dirty"] else ""
    machine = {
        "processor": processor(),
        "threads": str(threads),
        "device": device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": f"{state['commit']}{changed}",
        "python of the workers": "the peers' environment" if _has_peers() else "this one",
    }
    return machine | {name: os.environ[name] for name in DECISIVE if name in os.environ}


def _has_peers() -> bool:
    return ".venv-bench" in python()


def of_workers(result: Mapping[str, Any]) -> dict[str, str]:
    """Versions and precision, without facts of one contender only."""
    rows = result["contenders"].values()
    versions = {k: v for row in rows for k, v in row.get("facts", {}).items()}
    versions.pop("engine", None)
    return versions


def starter(workload: Workload, folder: Path, device: str, threads: int) -> Start:
    """Write the workload's numbers once; every worker reads the same ones."""
    np.savez(folder / "data.npz", **draw(workload))
    return partial(_process, workload.name, folder, device, threads)


def _process(name: str, folder: Path, device: str, threads: int, contender: Contender) -> Process:
    return Process(contender, name, folder, device, threads)


def run(
    workloads: Sequence[Workload],
    peers: list[str] | None,
    device: str,
    rounds: int,
    threads: int,
    out: Path,
) -> dict[str, Any]:
    """Measure the workloads and write JSON, picture and table to `out`."""
    report: dict[str, Any] = {
        "device": device,
        "rounds": rounds,
        "facts": facts(device, threads),
        "workloads": {},
    }
    for workload in workloads:
        print(f"{workload.name}: {workload}", flush=True)
        contenders = contenders_for(workload.kind, device, peers)
        with tempfile.TemporaryDirectory() as folder:
            start = starter(workload, Path(folder), device, threads)
            result = measure(workload, contenders, start, rounds, partial(print, flush=True))
        report["workloads"][workload.name] = result
        report["facts"] |= of_workers(result)
        results.save(report, out)
        print(f"\n{tables.of_workload(workload.name, result)}\n", flush=True)
    print(tables.of_facts(report))
    for path in results.render(report, out):
        print(path)
    return report
