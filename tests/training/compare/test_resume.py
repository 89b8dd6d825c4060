"""A comparison that was killed or interrupted resumes, and ends like one that was not."""

from __future__ import annotations

import signal

import pytest

from fastmeta.training import compare as comparing
from fastmeta.training import loop as training
from fastmeta.training.compare import compare
from fastmeta.training.compare.plan import plan
from fastmeta.training.config import TrainConfig, read_options
from tests.helpers.comparisons import Killed, kill, learners, record, run, sinusoid, timeless

pytest_plugins = ("tests.helpers.comparison_fixtures",)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("number", [1, 2, 6, 8])
def test_a_killed_comparison_goes_on(tmp_path, at_call, number):
    run(tmp_path / "whole", names=["maml", "fomaml"], checkpoint_every=2)
    at_call(number, kill)
    with pytest.raises(Killed):
        run(tmp_path / "killed", names=["maml", "fomaml"], checkpoint_every=2)
    at_call(0, kill)
    done = [bool(learner["evaluation"]) for learner in record(tmp_path / "killed")["learners"]]
    assert done == [number > 4, False]
    for name in ("comparison.md", "comparison.png"):
        assert (tmp_path / "killed" / name).exists() is done[0]
    compare(plan(tmp_path / "killed", resume=True), tmp_path / "killed", resume=True)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


def test_a_finished_learner_is_left_alone(tmp_path, at_call, monkeypatch):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    at_call(1, kill)
    monkeypatch.setattr(comparing, "evaluate_run", lambda *_, **__: kill())
    compare(sinusoid(tmp_path), tmp_path, tasks=10, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}


def test_killed_while_scoring_it_is_scored(tmp_path, monkeypatch, at_call):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(comparing, "evaluate_run", lambda *_, **__: kill())
        run(tmp_path, names=["maml"])
    assert learners(tmp_path)["maml"]["stopped"] == "finished"
    at_call(1, kill)  # nothing is trained
    compare(sinusoid(tmp_path, ["maml"]), tmp_path, tasks=10, resume=True)
    assert learners(tmp_path)["maml"]["evaluation"]["tasks"] == 10


def test_other_tasks_score_anew(tmp_path):
    run(tmp_path, names=["maml"])
    compare(sinusoid(tmp_path, ["maml"]), tmp_path, tasks=12, resume=True)
    assert record(tmp_path)["tasks"] == learners(tmp_path)["maml"]["evaluation"]["tasks"] == 12


def test_a_signal_ends_the_comparison_with_a_checkpoint(tmp_path, at_call):
    names = ["maml", "fomaml", "metasgd"]
    run(tmp_path / "whole", names)
    at_call(6, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = run(tmp_path / "stopped", names)
    at_call(0, kill)
    assert stopped.stopped_by == signal.SIGTERM
    assert [entry.iteration for entry in stopped.entries] == [4, 2, 0]
    assert [entry.stopped for entry in stopped.entries] == ["finished", "SIGTERM", ""]
    assert "not finished" in stopped.table()
    out = tmp_path / "stopped"
    resumed = compare(plan(out, resume=True), out, tasks=10, resume=True)
    assert resumed.stopped_by is None
    assert timeless(out) == timeless(tmp_path / "whole")


def test_more_iterations_go_on(tmp_path):
    run(tmp_path / "a", names=["maml"])
    run(tmp_path / "b", names=["maml"], iterations=6)
    configs = plan(tmp_path / "a", iterations=6, resume=True)
    compare(configs, tmp_path / "a", tasks=10, resume=True)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    with pytest.raises(ValueError, match="iterations: MAML has taken 6 already, got 5"):
        compare(
            plan(tmp_path / "a", iterations=5, resume=True), tmp_path / "a", tasks=10, resume=True
        )


def test_a_run_that_was_trained_on_is_scored_anew(tmp_path):
    run(tmp_path, names=["maml"])
    options = {**read_options(tmp_path / "maml"), "iterations": 5}
    training.train(TrainConfig(**options), resume=True)
    configs = plan(tmp_path, iterations=5, resume=True)
    compare(configs, tmp_path, tasks=10, resume=True)
    assert learners(tmp_path)["maml"]["evaluation"]["iteration"] == 5


def test_a_run_that_was_deleted_is_made_again(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    for file in (tmp_path / "a" / "reptile").iterdir():
        file.unlink()
    compare(plan(tmp_path / "a", resume=True), tmp_path / "a", tasks=10, resume=True)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")


LIMITED = {"iterations": 10**9, "time_limit": 0.3 / 60}


def test_the_time_limit_is_each_learner_s(tmp_path):
    found = run(tmp_path, names=["maml", "fomaml"], **LIMITED)
    assert [entry.stopped for entry in found.entries] == ["time limit"] * 2
    assert all(entry.iteration > 0 and entry.seconds < 0.5 for entry in found.entries)
    assert all(entry.evaluation for entry in found.entries)


def test_time_that_was_trained_counts(tmp_path, at_call, monkeypatch):
    limits = []
    train = comparing.train
    monkeypatch.setattr(
        comparing,
        "train",
        lambda config, **how: (limits.append(config.time_limit), train(config, **how))[1],
    )
    at_call(20, lambda: signal.raise_signal(signal.SIGINT))
    spent = run(tmp_path, names=["maml"], **LIMITED).entries[0].seconds
    compare(plan(tmp_path, resume=True), tmp_path, tasks=10, resume=True)
    assert limits == [LIMITED["time_limit"], pytest.approx((0.3 - spent) / 60)]
    assert learners(tmp_path)["maml"]["stopped"] == "time limit"
    assert read_options(tmp_path / "maml")["time_limit"] == LIMITED["time_limit"]
    compare(plan(tmp_path, resume=True), tmp_path, tasks=10, resume=True)
    assert len(limits) == 2  # its time is up
    compare(plan(tmp_path, time_limit=0.4 / 60, resume=True), tmp_path, tasks=10, resume=True)
    assert len(limits) == 3


def test_what_a_resumed_comparison_must_keep(tmp_path):
    run(tmp_path)
    for options, message in [
        ({"lr": 0.5}, "maml: lr: the run to resume began with 0.001, got 0.5"),
        ({"algorithms": ["maml"]}, "algorithms: the comparison to resume has maml, reptile"),
        ({"own": {"imaml": {"steps": 2}}}, "set: imaml is not compared, only maml, reptile"),
        ({"own": {"fomaml": {"steps": 2}}}, "fomaml: steps: the run to resume began with 5, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(plan(tmp_path, **options, resume=True), tmp_path, tasks=10, resume=True)
