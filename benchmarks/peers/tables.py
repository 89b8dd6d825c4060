"""A run's JSON as text for the terminal and as Markdown for the documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.peers.contenders import MATRIX, OURS

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Cells = tuple[str, ...]

HEADS = ("", "median", "quartiles", f"/ {OURS}", "GFLOP/s", "of peak")


def duration(seconds: float) -> str:
    """Three digits, in us, ms or s."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 0.9995e3 * size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds)} s"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded))) if rounded else 0}f}"


def share(row: Row) -> str:
    return f"{100 * row['of_peak']:.3g} %" if "of_peak" in row else ""


def measured(row: Row) -> Cells:
    """The cells of one contender, without its name."""
    low, high = (duration(row["seconds"][k]) for k in ("first_quartile", "third_quartile"))
    relative = digits(row["ratio"]) if "ratio" in row else ""
    speed = f"{row['flops_per_second'] / 1e9:.3g}"
    return duration(row["seconds"]["median"]), f"{low} to {high}", relative, speed, share(row)


def aligned(lines: list[Cells]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def of_workload(name: str, result: Row) -> str:
    """A workload's results, a line a contender, and why any is left out."""
    title = f"{name}: {result['what']}; {result['flops'] / 1e6:.4g} MFLOP a step"
    if "reason" in result:
        return f"{title}\n  {result['reason']}"
    rows = result["contenders"].values()
    lines = [(r["label"], *measured(r)) for r in rows if r["status"] == "measured"]
    left_out = [f"{r['label']}: {r['status']} ({r['reason']})" for r in rows if "reason" in r]
    engine = result["contenders"].get(OURS, {}).get("facts", {}).get("engine")
    told = [f"{OURS}: {engine}"] if engine else []
    return "\n".join([title, *aligned([HEADS, *lines]), *told, *left_out])


def of_facts(report: Report) -> str:
    """Machine, versions, threads and precision, a line each."""
    return "\n".join(f"{name}: {value}" for name, value in report["facts"].items())


# Markdown


def _labels(report: Report, kind: str) -> dict[str, str]:
    """Labels of the contenders of workloads of one kind, by name."""
    return {
        name: row["label"]
        for result in _results(report, kind).values()
        for name, row in result["contenders"].items()
        if name != MATRIX.name
    }


def _results(report: Report, kind: str) -> dict[str, Row]:
    workloads = report["workloads"]
    return {name: result for name, result in workloads.items() if result["kind"] == kind}


def _cell(name: str, result: Row) -> str:
    """The time, and its ratio to fastmeta's."""
    row = result["contenders"].get(name)
    if row is None:
        return ""
    if row["status"] != "measured":
        return row["status"]
    relative = f" ({digits(row['ratio'])})" if "ratio" in row and name != OURS else ""
    return duration(row["seconds"]["median"]) + relative


def _markdown(lines: list[list[str]]) -> str:
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("".join(f"| {c} " if c else "| " for c in cells) + "|" for cells in rows)


def _of_kind(report: Report, kind: str) -> str:
    results, labels = _results(report, kind), _labels(report, kind)
    lines = [["", *results]]
    for name, label in labels.items():
        shown = f"**{label}**" if name == OURS else label
        lines.append([shown, *(_cell(name, result) for result in results.values())])
    ours = [share(result["contenders"].get(OURS, {})) for result in results.values()]
    lines.append([f"{OURS}, of the matrix peak", *ours])
    return _markdown(lines)


def _reasons(report: Report) -> str:
    """Why contenders are left out, each reason once."""
    workloads_of: dict[str, list[str]] = {}
    for name, result in report["workloads"].items():
        for row in result["contenders"].values():
            if "reason" in row:
                workloads_of.setdefault(f"{row['label']}: {row['reason']}", []).append(name)
    return "\n".join(f"- {reason} ({', '.join(names)})" for reason, names in workloads_of.items())


def markdown(report: Report, picture: str) -> str:
    """Markdown of a run: where it was measured, a table a kind, what is missing, the picture."""
    facts = report["facts"]
    shown = ("processor", "threads", "torch", "jax", "learn2learn", "higher", "torchopt")
    names = {"processor": "", "threads": "threads "}
    told = ", ".join(f"{names.get(k, f'{k} ')}{facts[k]}" for k in shown if k in facts)
    kinds = dict.fromkeys(result["kind"] for result in report["workloads"].values())
    parts = [
        f"{told}; float32. Median time of a step, and in brackets how many times {OURS}'s it is:",
        *(_of_kind(report, kind) for kind in kinds),
        _reasons(report),
        f"![Time of a step, as a multiple of {OURS}'s]({picture})",
    ]
    return "\n\n".join(part for part in parts if part)
