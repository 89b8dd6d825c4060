"""Runs that exist are compared where they can be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmeta import cli
from fastmeta.training import compare as comparing
from fastmeta.training import loop as training
from fastmeta.training.compare import compare_runs
from fastmeta.training.compare.plan import plan
from fastmeta.training.config import TrainConfig
from tests.helpers.comparisons import Killed, kill, learners, record, run, sinusoid, timeless
from tests.helpers.runs import TINY

pytest_plugins = ("tests.helpers.comparison_fixtures",)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    folders = []
    for config in sinusoid(tmp_path / "runs", ["maml", "fomaml"]):
        training.train(config)
        folders.append(Path(config.out))
    return folders


def test_runs_that_exist_are_compared(tmp_path, runs, figures):
    states = [(run / "checkpoint.pt").read_bytes() for run in runs]
    found = compare_runs(runs, tmp_path / "out", tasks=10)
    run(tmp_path / "trained", names=["maml", "fomaml"])
    assert record(tmp_path / "out")["trained"] is False
    assert timeless(tmp_path / "out") == timeless(tmp_path / "trained")
    assert states == [(run / "checkpoint.pt").read_bytes() for run in runs]
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert found.table() in page
    assert f"--out {runs[0]}\n" in page
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["MAML", "FOMAML"]
    with pytest.raises(ValueError, match="trains nothing, its runs exist"):
        plan(tmp_path / "out", resume=True)
    with pytest.raises(FileExistsError, match="already holds a comparison"):
        compare_runs(runs, tmp_path / "out")
    compare_runs(runs[:1], tmp_path / "out", tasks=10, overwrite=True)
    assert list(learners(tmp_path / "out")) == ["maml"]


def test_the_options_of_the_scoring_arrive(tmp_path, runs, monkeypatch):
    asked = []
    evaluate = comparing.evaluate_run
    monkeypatch.setattr(
        comparing, "evaluate_run", lambda out, **how: (asked.append(how), evaluate(out, **how))[1]
    )
    options = ["--tasks", "5", "--queries", "7", "--device", "cpu:0"]
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["compare", "--runs", *map(str, runs), *options, *out]) == 0
    assert asked == [{"tasks": 5, "queries": 7, "device": "cpu:0"}] * 2
    assert "Mean over 5 evaluation tasks with 7 queries," in (
        (tmp_path / "out" / "comparison.md").read_text()
    )


def test_runs_of_other_queries_are_told_apart(tmp_path, runs):
    training.train(sinusoid(tmp_path / "more", ["maml"], queries=4)[0])
    found = compare_runs([*runs, tmp_path / "more" / "maml"], tmp_path / "out", tasks=5)
    labels = [f"MAML ({tmp_path}/{where}/maml)" for where in ("runs", "more")]
    assert [entry.label for entry in found.entries] == [labels[0], "FOMAML", labels[1]]
    assert "with 3 or 4 queries," in found.table()


def test_a_run_s_log_behind_its_checkpoint_does_not_count(tmp_path, at_call, figures):
    at_call(4, kill)
    with pytest.raises(Killed):
        training.train(sinusoid(tmp_path, ["maml"], checkpoint_every=2)[0])
    (entry,) = compare_runs([tmp_path / "maml"], tmp_path / "out", tasks=5).entries
    assert (entry.iteration, entry.stopped) == (2, "")
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 2


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("data", ("images", "others")),
        ("protocol", ("official", "paper")),
        ("ways", (3, 4)),
        ("shots", (1, 2)),
    ],
)
def test_runs_on_other_tasks_cannot_be_compared(tmp_path, from_memory, option, values):
    folders = [tmp_path / str(value) for value in values]
    for folder, value in zip(folders, values, strict=True):
        options = {"data": "images", **TINY, "iterations": 1, option: value}
        training.train(TrainConfig("maml", out=str(folder), **options))
    message = (
        f"{option}: expected the same in all runs, got {values[0]!r} in {folders[0]} "
        f"and {values[1]!r} in {folders[1]}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_runs(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared_are_told(tmp_path, runs, capsys):
    out = ["--out", str(tmp_path / "out")]
    for options, message in [
        ([str(runs[0]), str(runs[0])], f"runs: expected each once, got {runs[0]} 2 times"),
        ([str(runs[0]), str(tmp_path)], f"{tmp_path} holds no training run"),
        ([str(runs[0]), "--tasks", "1"], "tasks: expected at least 2"),
        ([str(runs[0]), "--lr", "0.1"], "lr: not for --runs, whose runs are trained already"),
        ([str(runs[0]), "--resume"], "resume: not for --runs, whose runs are trained"),
        ([str(runs[0]), "--threads", "0"], "threads: expected an integer >= 1, got 0"),
    ]:
        assert cli.main(["compare", "--runs", *options, *out]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="runs: expected at least one, got none"):
        compare_runs([], tmp_path / "out")
