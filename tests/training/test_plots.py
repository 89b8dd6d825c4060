"""The learning-curve picture: what is drawn, and that smoothing is a running mean."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastmeta.training.evaluation import Evaluation
from fastmeta.training.plots import Curve, draw_comparison, draw_curves, smooth


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


def compared(path, drawn, means, score="accuracy"):
    """The two panels of a comparison of learners that score like that; ``None``: no score."""
    found = [mean and Evaluation(score, mean, 0.01, tasks=100) for mean in means]
    curves = [Curve(f"learner {i}", metrics(200, score), "") for i in range(len(means))]
    draw_comparison(path / "comparison.png", curves, found, score)
    return drawn[0].axes


@pytest.mark.parametrize(
    ("score", "expected"),
    [("accuracy", [1, 3, 0]), ("mse", [0, 3, 1])],
)
def test_the_best_score_of_a_comparison_is_on_top(tmp_path, drawn, score, expected):
    _, scores = compared(tmp_path, drawn, [0.5, 0.9, None, 0.75], score)
    ticks = [text.get_text().split("\n") for text in scores.get_yticklabels()]
    assert [name for name, _ in reversed(ticks)] == [f"learner {i}" for i in expected]
    digits = "75.00 ± 1.00" if score == "accuracy" else "0.750 ± 0.010"
    assert dict(ticks)["learner 3"] == digits
    heights = dict(zip((name for name, _ in ticks), scores.get_yticks(), strict=True))
    points = [line for line in scores.lines if line.get_marker() == "o"]
    at = {line.get_ydata()[0]: line.get_xdata()[0] for line in points}
    assert at[heights["learner 0"]] == (50 if score == "accuracy" else 0.5)


def test_a_learner_has_one_colour_in_both_panels(tmp_path, drawn):
    lines, scores = compared(tmp_path, drawn, [0.5, 0.9, 0.75])
    points = [line for line in scores.lines if line.get_marker() == "o"]
    colours = {line.get_label(): line.get_color() for line in lines.lines}
    names = [text.get_text().split("\n")[0] for text in scores.get_yticklabels()]
    assert {name: of.get_color() for name, of in zip(names, points, strict=True)} == colours
    assert len(set(colours.values())) == 3


def test_many_learners_can_be_told_apart(tmp_path, drawn):
    lines, _ = compared(tmp_path, drawn, [0.5] * 25)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.lines}) == 25
    legend = drawn[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [f"learner {i}" for i in range(25)]


def test_lines_of_a_comparison_are_smooth(tmp_path, drawn):
    noise = np.random.default_rng(0).random(600)
    records = [{"iteration": i, "seconds": i, "accuracy": x} for i, x in enumerate(noise)]
    draw_comparison(tmp_path / "comparison.png", [Curve("MAML", records, "")], [None], "accuracy")
    line = drawn[0].axes[0].lines[0].get_ydata()
    assert line.mean() == pytest.approx(50, abs=3)
    assert line[100:500].std() < 3 < 100 * noise.std() / 3
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == list(range(600))


def test_what_a_curve_shows_stands_in_the_legend(tmp_path, drawn):
    curves = [Curve("ProtoNet", metrics(9), "20-way training"), Curve("MAML", [], "")]
    draw_comparison(tmp_path / "comparison.png", curves, [None, None], "accuracy")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["ProtoNet, 20-way training", "MAML"]
    assert (tmp_path / "comparison.png").read_bytes()[1:4] == b"PNG"
