"""Committed results, one folder a GPU in benchmarks/results/, and their table for documents."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.runner import is_good

RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}  # of precisions

Row = Mapping[str, Any]


def _time(row: Row) -> str:
    seconds = row["seconds"]["fastmeta"]["median"]
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def _of_floor(row: Row) -> str:
    return f"{100 * row['of_floor']:.0f} %"


def _of_copy(row: Row) -> str:
    return f"{100 * row['of_copy']:.0f} %"


@dataclass(frozen=True)
class Shown:
    """A line of the table: the row of the benchmarks, its figure, and the target."""

    label: str
    workload: str
    what: str
    dtype: str
    how: str
    value: Callable[[Row], str]
    aim: str = ""

    def cell(self, report: Mapping[str, Any]) -> str:
        """The cell of a row; empty if it was not measured, or its result was wrong."""
        key = (self.workload, self.what, self.dtype, self.how)
        for row in report["steps"]["benchmarks"]["rows"]:
            row_key = tuple(row[name] for name in ("workload", "what", "dtype", "how"))
            if row_key == key and "ratios" in row:
                return self.value(row)
        return ""


def _small(tasks: int, what: str, aim: str = "") -> Shown:
    name = f"proto_small, T = {tasks}"
    label = f"prototype_loss, {name}, {what}, a call in a CUDA graph"
    return Shown(label, name, what, "float32", "graph of 20", _time, aim)


def _big(dtype: str) -> Shown:
    label = f"prototype_loss, proto_big, forward, {dtype}, of the arithmetic floor"
    return Shown(label, "proto_big", "forward", dtype, "eager", _of_floor, "at least 50 %")


def _update(parameters: int) -> Shown:
    label = f"inner_update, 1 x {parameters // 10**6}M, of copy bandwidth"
    name = f"1 x {parameters}"
    return Shown(label, name, "forward", "float32", "eager", _of_copy, "at least 85 %")


def _program(workload: str, what: str, aim: str = "") -> Shown:
    label = f"task program, {workload}, {what}, a call in a CUDA graph"
    return Shown(label, workload, what, "float32", "graph of 20", _time, aim)


def _images(workload: str, precision: str) -> Shown:
    label = f"task program, {workload}, meta-step, {NAMES[precision]}, a call in a CUDA graph"
    return Shown(label, workload, "meta-step", precision, "graph of 2", _time)


def _convolution(what: str, precision: str) -> Shown:
    name = "T = 32, B = 75, 64 channels, 14 x 14"
    label = f"task_conv2d, {name}, {what}, {NAMES[precision]}, of the arithmetic floor"
    return Shown(label, name, what, precision, "eager", _of_floor)


SHOWN = (
    _small(1, "forward", "at most 15 us"),
    _small(1, "forward + backward"),
    _small(32, "forward", "at most 15 us"),
    _small(32, "forward + backward"),
    _program("sin1", "meta-step", "at most 25 us"),
    _program("sin5", "meta-step", "at most 25 us"),
    _program("omni_mlp", "meta-step"),
    _program("hvp_mlp_t1", "Hessian-vector product"),
    Shown(
        *("linear_head, anil, meta-step, a call in a CUDA graph", "anil", "meta-step"),
        *("float32", "graph of 20", _time, "at most 20 us"),
    ),
    *(_images(w, p) for w in ("omni_paper", "omni_20w", "mini_conv5") for p in ("float32", "tf32")),
    *(_convolution(w, p) for w in ("forward", "forward + backward") for p in NAMES),
    _big("float32"),
    _big("bfloat16"),
    _update(100_000_000),
)


def table(reports: list[Mapping[str, Any]]) -> str:
    """Markdown table of the kept results, a column for each report."""
    heads = ["workload", "aim", *([r["gpu"] for r in reports] or ["NVIDIA H200"])]
    lines = [heads, ["---"] * len(heads)]
    for shown in SHOWN:
        lines.append([shown.label, shown.aim, *([shown.cell(r) for r in reports] or [""])])
    return "\n".join("".join(f"| {c} " if c else "| " for c in cells) + "|" for cells in lines)


def committed(folder: Path = RESULTS) -> list[Mapping[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/report.json"))]


def folder_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def keep(out: Path, folder: Path = RESULTS) -> Path:
    """Copies the results in `out` to the folder of their GPU. Raises ValueError for half a run."""
    report = json.loads((out / "report.json").read_text())
    if not is_good(report):
        got = ", ".join(f"{name} {step['status']}" for name, step in report["steps"].items())
        raise ValueError(f"report: expected a run in which nothing failed, got {got}")
    target = folder / folder_name(report["gpu"])
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "report.json", target / "report.json")
    lines = (out / "ops.txt").read_text().splitlines(keepends=True)
    (target / "ops.txt").write_text("".join(x for x in lines if not x.startswith("$ ")))
    return target
