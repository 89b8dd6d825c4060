"""The learning-curve picture: what is drawn, and that smoothing is a running mean."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastmeta.curves import Curve, draw_curves, smooth


def metrics(count: int, score: str = "accuracy") -> list[dict]:
    records = [{"iteration": i, "seconds": i / 5, score: i / count} for i in range(1, count + 1)]
    if records:
        records[-1] |= {"validation": 0.9, "validation_interval": 0.01}
    return records


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that draw_curves saves."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_smoothing_is_a_centred_running_mean():
    values = np.random.default_rng(0).normal(size=50)
    smoothed = smooth(values, 5)
    assert smoothed[20] == pytest.approx(values[18:23].mean())
    assert smoothed[0] == pytest.approx(values[:3].mean())
    assert smoothed[-1] == pytest.approx(values[-3:].mean())
    assert smooth(values, 1) == pytest.approx(values)


def test_the_picture_shows_raw_line_smooth_line_and_validation(tmp_path, drawn):
    draw_curves(tmp_path / "curve.png", [Curve("ProtoNet", metrics(200))], "accuracy")
    axes = drawn[0].axes[0]
    raw, smoothed, validation = axes.lines
    assert list(raw.get_ydata()) == pytest.approx([i / 2 for i in range(1, 201)])
    assert raw.get_alpha() < 0.5
    assert len(smoothed.get_ydata()) == 200
    assert list(validation.get_xdata()) == [200]
    assert list(validation.get_ydata()) == pytest.approx([90])
    assert axes.get_xlabel() == "Iteration"
    assert axes.get_ylabel() == "Query accuracy [%]"
    assert imread(io.BytesIO((tmp_path / "curve.png").read_bytes())).shape[:2] == (704, 1152)


def test_two_curves_over_time(tmp_path, drawn):
    curves = [Curve("ProtoNet", metrics(50)), Curve("MAML", metrics(20))]
    draw_curves(tmp_path / "curve.png", curves, "accuracy", x="seconds")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "Training time [s]"
    assert axes.lines[0].get_xdata()[-1] == 10
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"ProtoNet, training", "MAML, training"} <= set(labels)


def test_mean_squared_errors_are_no_percentages(tmp_path, drawn):
    draw_curves(tmp_path / "curve.png", [Curve("MAML", metrics(10, "mse"))], "mse")
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "Query mean squared error"
    assert axes.lines[0].get_ydata()[-1] == 1
    assert axes.get_ylim()[0] == 0


def test_rare_spikes_do_not_stretch_the_axis_of_errors(tmp_path, drawn):
    records = metrics(1000, "mse")
    records[500]["mse"] = 1000.0
    draw_curves(tmp_path / "curve.png", [Curve("MAML", records)], "mse")
    axes = drawn[0].axes[0]
    assert axes.lines[0].get_ydata().max() == 1000
    assert axes.lines[1].get_ydata().max() < axes.get_ylim()[1] < 50


def test_validation_is_on_the_axis_of_errors(tmp_path, drawn):
    records = metrics(10, "mse")
    records[4] |= {"validation": 7.0, "validation_interval": 2.0}
    draw_curves(tmp_path / "curve.png", [Curve("MAML", records)], "mse")
    assert 9 < drawn[0].axes[0].get_ylim()[1] < 10


@pytest.mark.parametrize(
    ("count", "label"), [(3, "0.5"), (70_000, "10,000"), (3_000_000, "1,000,000")]
)
def test_iterations_are_written_out(tmp_path, drawn, count, label):
    records = [{"iteration": i, "accuracy": 0.5} for i in (1, count)]
    draw_curves(tmp_path / "curve.png", [Curve("MAML", records)], "accuracy")
    assert label in [text.get_text() for text in drawn[0].axes[0].get_xticklabels()]


@pytest.mark.parametrize("score", ["accuracy", "mse"])
def test_a_run_without_an_iteration_draws_too(tmp_path, score):
    draw_curves(tmp_path / "curve.png", [Curve("MAML", [])], score)
    assert (tmp_path / "curve.png").stat().st_size > 1000
