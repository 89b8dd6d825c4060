"""The bar chart of a run: the time of a step of each contender, workload by workload."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import MATRIX, OURS
from benchmarks.peers.tables import digits, duration

Rows = Mapping[str, Mapping[str, Any]]

OURS_COLOUR, OTHER_OURS_COLOUR, THEIR_COLOUR = "#c8384c", "#e4a3ab", "#8d99ae"
INK, FAINT = "#2b2d42", "#6b7080"
COLUMNS = 2
BAR = 0.27  # inches of height of a contender
FRAME = 0.75  # inches of a panel besides its bars


def _colour(name: str) -> str:
    if name.startswith(OURS):
        return OURS_COLOUR if name == OURS else OTHER_OURS_COLOUR
    return THEIR_COLOUR


def _text(name: str, row: Mapping[str, Any]) -> str:
    """The time and its ratio to fastmeta's, or the reason why there is none."""
    if row["status"] != "measured":
        return row["status"]
    time = duration(row["seconds"]["median"])
    return f"{time}  ({digits(row['ratio'])}x)" if "ratio" in row and name != OURS else time


def _bars(axes: Any, rows: Rows) -> None:
    """One bar a contender on a logarithmic axis of seconds, and a line at the end of fastmeta's."""
    times = {n: row["seconds"]["median"] for n, row in rows.items() if row["status"] == "measured"}
    low, high = min(times.values(), default=1.0), max(times.values(), default=1.0)
    left = low / max(1.5, (high / low) ** 0.12)  # the shortest bar is an eighth of the longest
    for place, (name, row) in enumerate(rows.items()):
        end, known = times.get(name, left), name in times
        axes.barh(place, end - left, left=left, height=0.74, color=_colour(name))
        axes.annotate(
            _text(name, row),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK if known else FAINT,
            style="normal" if known else "italic",
            fontweight="bold" if name == OURS else "normal",
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )
    if OURS in times:
        axes.axvline(times[OURS], color=OURS_COLOUR, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(left, high * (high / left) ** 0.45)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows.values()], fontsize=8)


def _panel(axes: Any, name: str, result: Mapping[str, Any]) -> None:
    _bars(axes, {n: r for n, r in result["contenders"].items() if n != MATRIX.name})
    axes.set_title(f"{name}\n", loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.annotate(
        result["what"],
        *((0, 1), (0, 5)),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(axis="both", which="both", length=0, labelcolor=INK)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)


def draw(report: Mapping[str, Any], path: Path, names: Collection[str] = ()) -> None:
    """Write a PNG atomically: a panel a workload, a bar a contender.

    Args:
        report: a run.
        path: the file to write.
        names: workloads to draw; none: all of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = {
        name: result
        for name, result in report["workloads"].items()
        if result["contenders"] and (not names or name in names)
    }
    lines = -(-len(results) // COLUMNS) or 1
    most = max((len(r["contenders"]) for r in results.values()), default=1)
    figure = Figure(figsize=(11, 0.6 + lines * (FRAME + BAR * most)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    facts = report["facts"]
    where = f"{facts['processor']}, {facts['threads']} threads"
    title = f"Time of a step, and how many times {OURS}'s it is ({where}; logarithmic)"
    figure.suptitle(title, fontsize=11, color=INK)
    panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        _panel(axes, name, result)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    os.replace(temporary, path)
