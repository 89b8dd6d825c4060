"""Pictures of learning curves: in full for single runs, smoothed for comparisons of learners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmeta.training.evaluation import Evaluation
from fastmeta.training.files import write_atomically

_X_LABELS = {"iteration": "Iteration", "seconds": "Training time [s]"}

_Y_LABELS = {"accuracy": "Query accuracy [%]", "mse": "Query mean squared error"}

_WINDOWS = 40  # running means that smooth a line span a 40th of the run

_WINDOWS_OF_MANY = 12  # smoother, since rough lines of many runs would hide each other

_LINES, _COLOURS = ("-", "--", "-.", ":"), 10

_SHOWN = 99  # percent of a run's errors inside the axis, which a few spikes would fill otherwise


@dataclass(frozen=True)
class Curve:
    """The learning curve of one run.

    Attributes:
        label: its name in the legend.
        metrics: records of a :class:`fastmeta.training.metrics_log.MetricsLog`:
            ``iteration``, ``seconds``, ``accuracy`` or ``mse``, and ``validation`` in some.
        training, validation: names of the line and the points in the legend.
    """

    label: str
    metrics: Sequence[dict[str, Any]]
    training: str = "training"
    validation: str = "validation"


def draw_curves(path: Path, curves: Sequence[Curve], score: str, x: str = "iteration") -> None:
    """Write the learning curves as one PNG, atomically.

    An axis of errors spans the smoothed lines and 99 % of the raw values.

    Args:
        path: the file.
        curves: one per run; a run without iterations gets only an entry in the legend.
        score: ``"accuracy"`` or ``"mse"``, on the vertical axis.
        x: ``"iteration"`` or ``"seconds"``, on the horizontal axis.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> metrics = [{"iteration": i, "seconds": 0.1 * i, "mse": 1 / i} for i in range(1, 50)]
        >>> path = Path(tempfile.mkdtemp()) / "curve.png"
        >>> draw_curves(path, [Curve("maml", metrics)], "mse")
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        _draw(axes, curve, score, x, f"C{index}")
    _finish(axes, curves, score, x)
    axes.legend(frameon=False, loc="lower right" if score == "accuracy" else "upper right")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def draw_comparison(
    path: Path,
    curves: Sequence[Curve],
    found: Sequence[Evaluation | None],
    score: str,
) -> None:
    """Write the learning curves and the final scores of many learners as one PNG, atomically.

    Left: the smoothed curves over training time. Right: a point with its interval for each
    learner, the best on top. A learner has the same colour in both.

    Args:
        path: the file.
        curves: one per learner; ``training``, if not empty, is a note in the legend.
        found: score of each learner; ``None``: it has none.
        score: ``"accuracy"`` or ``"mse"``.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> metrics = [{"iteration": i, "seconds": 0.1 * i, "mse": 1 / i} for i in range(1, 50)]
        >>> path = Path(tempfile.mkdtemp()) / "comparison.png"
        >>> found = Evaluation("mse", mean=0.3, interval=0.01, tasks=100)
        >>> draw_comparison(path, [Curve("MAML", metrics, "")], [found], "mse")
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    figure = Figure(figsize=(11, 4.8), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    scale = _scale(score)
    for curve, style in zip(curves, _styles(), strict=False):
        at, raw = _column(curve.metrics, "seconds"), scale * _column(curve.metrics, score)
        label = ", ".join(filter(None, (curve.label, curve.training)))
        left.plot(at, _smoothed(raw, _WINDOWS_OF_MANY), linewidth=1.6, label=label, **style)
    _finish(left, curves, score, "seconds")
    left.set_title("Training, smoothed")
    figure.legend(loc="outside lower center", ncols=min(5, max(1, len(curves))), frameon=False)
    _draw_scores(right, curves, found, score)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw_scores(
    axes: Axes,
    curves: Sequence[Curve],
    found: Sequence[Evaluation | None],
    score: str,
) -> None:
    scale = _scale(score)
    rows = [
        (of, f"{curve.label}\n{of.digits}", style["color"])
        for curve, of, style in zip(curves, found, _styles(), strict=False)
        if of is not None
    ]
    rows.sort(key=lambda row: row[0].mean, reverse=score == "mse")  # the last row is on top
    for height, (of, _, colour) in enumerate(rows):
        mean, interval = scale * of.mean, scale * of.interval
        axes.errorbar(mean, height, xerr=interval, fmt="o", color=colour, capsize=4, markersize=6)
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    axes.set_ylim(-0.6, max(1, len(rows)) - 0.4)
    axes.set_xlabel(_Y_LABELS[score])
    axes.set_title("Evaluation, with 95 % intervals")
    _tidy(axes)


def _styles() -> Iterator[dict[str, str]]:
    """Distinct lines: ten colours, then the same colours with another dash pattern."""
    return (
        {"color": f"C{colour}", "linestyle": line} for line in _LINES for colour in range(_COLOURS)
    )


def _scale(score: str) -> int:
    return 100 if score == "accuracy" else 1


def _finish(axes: Axes, curves: Sequence[Curve], score: str, x: str) -> None:
    """Labels, limits and grid of an axis with learning curves."""
    axes.set_xlabel(_X_LABELS[x])
    axes.set_ylabel(_Y_LABELS[score])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    if score == "accuracy":
        axes.set_ylim(top=101)
    else:
        axes.set_ylim(0, _error_limit(curves, score))
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over ``window`` values, fewer towards the ends.

    Example:
        >>> smooth(np.array([0.0, 3.0, 6.0, 3.0]), 3)
        array([1.5, 3. , 4. , 4.5])
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    middle = np.arange(len(values))
    first = np.maximum(middle - window // 2, 0)
    last = np.minimum(middle + (window + 1) // 2, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw(axes: Axes, curve: Curve, score: str, x: str, colour: str) -> None:
    scale = _scale(score)
    at, raw = _column(curve.metrics, x), scale * _column(curve.metrics, score)
    axes.plot(at, raw, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(
        at, _smoothed(raw), color=colour, linewidth=1.8, label=f"{curve.label}, {curve.training}"
    )
    if validated := _validated(curve):
        axes.errorbar(
            _column(validated, x),
            scale * _column(validated, "validation"),
            scale * _column(validated, "validation_interval"),
            fmt="o",
            color=colour,
            markersize=6,
            markeredgecolor="white",
            label=f"{curve.label}, {curve.validation}",
        )


def _error_limit(curves: Sequence[Curve], score: str) -> float | None:
    """Upper end of an axis of errors, above all but rare spikes; ``None`` if nothing is drawn."""
    ends = [0.0]
    for curve in curves:
        raw = _column(curve.metrics, score)
        if len(raw):
            ends += [np.percentile(raw, _SHOWN), _smoothed(raw).max()]
        ends += [m["validation"] + m["validation_interval"] for m in _validated(curve)]
    return 1.05 * max(ends) or None


def _smoothed(raw: np.ndarray, windows: int = _WINDOWS) -> np.ndarray:
    window = max(1, len(raw) // windows)
    return smooth(smooth(raw, window), window)


def _column(metrics: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in metrics], dtype=np.float64)


def _validated(curve: Curve) -> list[dict[str, Any]]:
    return [record for record in curve.metrics if "validation" in record]
