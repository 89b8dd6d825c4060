"""The bar chart of a run: how many times fastmeta's time each contender takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import MATRIX, OURS
from benchmarks.peers.tables import UNIT, digits, duration

Rows = Mapping[str, Mapping[str, Any]]

OUR_COLOUR, THEIR_COLOUR, INK, FAINT = "#d1495b", "#8d99ae", "#2b2d42", "#6b7080"
COLUMNS = 2
BAR = 0.3  # inches of height of a contender
FRAME = 0.85  # inches of a panel besides its bars


def _bars(axes: Any, rows: Rows) -> None:
    """One bar a contender on a logarithmic axis, the fastest not necessarily on top."""
    ratios = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
    low, high = min([1.0, *ratios.values()]), max([2.0, *ratios.values()])
    left = 0.8 * low  # bars have a visible length even at the smallest ratio
    for place, (name, row) in enumerate(rows.items()):
        ours = name == OURS
        if name in ratios:
            colour = OUR_COLOUR if ours else THEIR_COLOUR
            axes.barh(place, ratios[name] - left, left=left, height=0.72, color=colour)
        text = _text(name, row)
        axes.annotate(
            text,
            (ratios.get(name, left), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK if name in ratios else FAINT,
            style="normal" if name in ratios else "italic",
        )
    axes.set_xscale("log")
    axes.set_xlim(left, high * (high / left) ** 0.35)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows.values()], fontsize=8)
    axes.invert_yaxis()


def _text(name: str, row: Mapping[str, Any]) -> str:
    if row["status"] != "measured":
        return UNIT[row["status"]]
    time = duration(row["seconds"]["median"])
    return f"{digits(row['ratio'])}x   {time}" if "ratio" in row and name != OURS else time


def _panel(axes: Any, name: str, result: Mapping[str, Any]) -> None:
    _bars(axes, {n: r for n, r in result["contenders"].items() if n != MATRIX.name})
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_title(result["what"], loc="right", fontsize=7.5, color=FAINT)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(axis="both", which="both", length=0, labelcolor=INK)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG, atomically: a panel a workload, a bar a contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = {n: r for n, r in report["workloads"].items() if r["contenders"]}
    lines = -(-len(results) // COLUMNS) or 1
    most = max((len(r["contenders"]) for r in results.values()), default=1)
    figure = Figure(figsize=(11, 0.6 + lines * (FRAME + BAR * most)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.05)
    figure.suptitle(
        f"Time of a meta-step, as a multiple of {OURS}'s (shorter is better)", color=INK
    )
    panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        _panel(axes, name, result)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    os.replace(temporary, path)
