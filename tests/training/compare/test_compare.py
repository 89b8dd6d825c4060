"""A comparison of learners: what it leaves, which folders it guards, and learners that diverge."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmeta import cli
from fastmeta.training import compare as comparing
from fastmeta.training import loop as training
from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.command_line import train_command
from fastmeta.training.compare import compare
from fastmeta.training.compare.plan import plan
from fastmeta.training.config import read_options
from fastmeta.training.metrics_log import read_metrics
from tests.helpers.comparisons import NAMES, Killed, kill, learners, record, run, sinusoid, timeless
from tests.helpers.runs import TINY

pytest_plugins = ("tests.helpers.comparison_fixtures",)
pytestmark = pytest.mark.usefixtures("undrawn")


# What it leaves


def test_the_record_is_what_the_runs_say(tmp_path):
    found = run(tmp_path)
    assert record(tmp_path)["trained"] is True
    assert list(learners(tmp_path)) == NAMES
    for name, learner in learners(tmp_path).items():
        folder = tmp_path / name
        assert learner["options"] == read_options(folder)
        assert learner["evaluation"] == json.loads((folder / "eval.json").read_text())
        assert record(tmp_path)["tasks"] == learner["evaluation"]["tasks"] == 10
        assert (learner["iterations"], learner["stopped"], learner["error"]) == (4, "finished", "")
        assert learner["seconds"] == load_checkpoint(folder / "checkpoint.pt")["seconds"]
        assert learner["seconds_per_iteration"] == learner["seconds"] / 4
    assert [entry.record() for entry in found.entries] == record(tmp_path)["learners"]


def test_the_runs_are_those_that_train_makes(tmp_path):
    run(tmp_path / "all")
    for config in sinusoid(tmp_path / "alone"):
        training.train(config)
        other = tmp_path / "all" / config.algorithm
        states = [load_checkpoint(p / "checkpoint.pt") for p in (Path(config.out), other)]
        assert repr(states[0]["learner"]) == repr(states[1]["learner"])
        assert (other / "curve.png").exists()


def test_the_table_ranks_the_learners(tmp_path):
    table = run(tmp_path, own={"maml": {"steps": 2, "eval_steps": 3}}).table()
    head, rule, *rows = table.splitlines()[:5]
    assert re.findall(r"\w[^|]*\w", head) == [
        *("Learner", "Inner steps", "Iterations", "Training time", "MSE")
    ]
    assert {len(line) for line in (head, rule, *rows)} == {len(head)}
    ranked = sorted(learners(tmp_path).values(), key=lambda of: of["evaluation"]["mean"])
    for row, learner in zip(rows, ranked, strict=True):
        found = learner["evaluation"]
        name, steps, iterations, seconds, score = (cell.strip() for cell in row.split("|")[1:-1])
        assert (name, iterations) == (learner["label"], "4")
        assert seconds == f"{learner['seconds']:.1f} s"
        assert score == f"{found['mean']:.3f} ± {found['interval']:.3f}"
        expected = {"MAML": "2 / 3", "FOMAML": "5 / 5", "Reptile": "5 / 50"}
        assert steps == expected[name]
    assert "Mean over 10 evaluation tasks with 3 queries, " in table


def test_the_best_accuracy_is_the_highest(tmp_path, from_memory):
    names = ["protonet", "maml", "metasgd"]
    table = compare(plan(tmp_path, "images", names, **TINY), tmp_path, tasks=10).table()
    found = [learner["evaluation"] for learner in record(tmp_path)["learners"]]
    found.sort(key=lambda of: of["mean"], reverse=True)
    rows = table.splitlines()[2:5]
    for row, of in zip(rows, found, strict=True):
        assert row.endswith(f"{100 * of['mean']:.2f} ± {100 * of['interval']:.2f} |")
    protonet = next(row for row in rows if "ProtoNet" in row)
    assert protonet.split("|")[2].strip() == "-"
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith("# Learners on images, 5-way 1-shot\n")
    assert "3 queries per class" in page


def test_the_page_holds_table_picture_and_commands(tmp_path):
    found = run(tmp_path)
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith("# Learners on sinusoid, 10-shot\n")
    assert found.table() in page
    assert "(comparison.png)" in page
    commands = re.search(r"```sh\n(.*)```", page, re.DOTALL)[1].splitlines()
    assert set(commands) == {train_command(config) for config in sinusoid(tmp_path)}
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")][2:]
    labels = {algorithm: learner["label"] for algorithm, learner in learners(tmp_path).items()}
    assert [labels[command.split()[4]] for command in commands] == rows


def test_the_picture_shows_every_learner(tmp_path, figures):
    run(tmp_path)
    assert (tmp_path / "comparison.png").read_bytes()[1:4] == b"PNG"
    (legend,) = figures[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("MAML", "Reptile, training on the queries", "FOMAML")
    ]
    lines, scores = figures[-1].axes
    times = [line.get_xdata()[-1] for line in lines.lines]
    logged = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["seconds"] for name in NAMES]
    assert times == logged
    ranked = sorted(learners(tmp_path).values(), key=lambda of: -of["evaluation"]["mean"])
    ticks = [text.get_text() for text in scores.get_yticklabels()]
    assert [tick.split("\n")[0] for tick in ticks] == [learner["label"] for learner in ranked]
    points = [line.get_xdata()[0] for line in scores.lines if line.get_marker() == "o"]
    assert points == [learner["evaluation"]["mean"] for learner in ranked]


def test_training_on_other_ways_is_told(tmp_path, from_memory, figures):
    own = {"protonet": {"train_ways": 8}}
    configs = plan(tmp_path, "images", ["protonet", "maml"], own, **TINY)
    compare(configs, tmp_path, tasks=5)
    labels = [text.get_text() for text in figures[-1].legends[0].get_texts()]
    assert labels == ["ProtoNet, 8-way training", "MAML"]


def test_every_learner_is_reported(tmp_path):
    said = []
    compare(sinusoid(tmp_path), tmp_path, tasks=5, report=lambda entry: said.append(str(entry)))
    mean = learners(tmp_path)["maml"]["evaluation"]["mean"]
    assert re.fullmatch(rf"MAML: 4 iterations in [\d.]+ s, MSE {mean:.3f} ± [\d.]+", said[0])
    assert [line.partition(":")[0] for line in said] == ["MAML", "Reptile", "FOMAML"]


def test_threads_are_for_the_scoring_too(tmp_path, monkeypatch):
    seen = []
    evaluate = comparing.evaluate_run
    monkeypatch.setattr(
        comparing,
        "evaluate_run",
        lambda *args, **how: (seen.append(torch.get_num_threads()), evaluate(*args, **how))[1],
    )
    before = torch.get_num_threads()
    run(tmp_path, names=["maml"], threads=before + 1)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


# Folders


def test_folders_that_hold_something_are_guarded(tmp_path):
    run(tmp_path / "a")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="already holds a comparison"):
        run(tmp_path / "a")
    (tmp_path / "a" / "comparison.json").rename(tmp_path / "aside")
    with pytest.raises(FileExistsError, match="maml already holds a run"):
        run(tmp_path / "a")
    (tmp_path / "aside").rename(tmp_path / "a" / "comparison.json")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        run(tmp_path / "file")
    configs = sinusoid(tmp_path / "a")
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        compare(configs, tmp_path / "a", resume=True, overwrite=True)
    (tmp_path / "file").unlink()
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_one_run_in_the_way_keeps_all_from_beginning(tmp_path):
    training.train(sinusoid(tmp_path)[-1])
    with pytest.raises(FileExistsError, match="fomaml already holds a run"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fomaml"]


def test_overwriting_replaces_all(tmp_path, at_call):
    run(tmp_path / "a")
    at_call(5, kill)
    with pytest.raises(Killed):
        compare(sinusoid(tmp_path / "a", seed=1), tmp_path / "a", tasks=10, overwrite=True)
    at_call(0, kill)
    assert not (tmp_path / "a" / "fomaml" / "checkpoint.pt").exists()
    compare(plan(tmp_path / "a", resume=True), tmp_path / "a", tasks=10, resume=True)
    run(tmp_path / "b", seed=1)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")


@pytest.mark.parametrize("text", ["{", "[]", '{"trained": true, "learners": [{"label": "MAML"}]}'])
def test_a_damaged_record_is_told(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match=r"comparison.json is damaged"):
        plan(tmp_path, resume=True)


# Learners that diverge

DIVERGING = {"maml": {"inner_lr": 1e30}}


def test_a_learner_that_diverges_does_not_stop_the_others(tmp_path, capsys, figures):
    command = ["compare", "--data", "sinusoid", "--out", str(tmp_path), "--hidden", "4"]
    command += ["--iterations", "4", "--tasks", "5", "--algorithms", *NAMES]
    assert cli.main([*command, "--set", "maml.inner_lr=1e30"]) == 2
    found = learners(tmp_path)
    assert found["maml"]["stopped"] == "diverged"
    assert found["maml"]["iterations"] == 0
    assert re.match("the loss became (nan|inf) in iteration 1; ", found["maml"]["error"])
    assert found["maml"]["evaluation"] is None
    assert all(found[name]["evaluation"] for name in NAMES[1:])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert re.match(r"\| MAML .* diverged \|", rows[-1])
    assert f"MAML diverged: {found['maml']['error']}." in out
    assert len(figures[-1].axes[1].get_yticks()) == 2


def test_a_diverged_learner_is_not_tried_again(tmp_path, at_call):
    first = run(tmp_path, own=DIVERGING)
    at_call(1, kill)
    again = compare(plan(tmp_path, resume=True), tmp_path, tasks=10, resume=True)
    assert again.entries == first.entries


def test_diverging_later_keeps_the_curve(tmp_path, at_call, figures):
    def diverge():
        raise FloatingPointError("the loss became inf")

    at_call(4, diverge)
    entry = run(tmp_path, names=["maml"]).entries[0]
    assert (entry.iteration, entry.stopped, entry.error) == (3, "diverged", "the loss became inf")
    assert entry.seconds == read_metrics(tmp_path / "maml" / "metrics.jsonl")[-1]["seconds"]
    assert len(figures[-1].axes[0].lines[0].get_xdata()) == 3


def test_diverging_in_evaluation_is_told(tmp_path):
    own = {"maml": {"inner_lr": 1e3, "eval_steps": 300}}
    found = run(tmp_path, names=["maml", "fomaml"], own=own, iterations=1)
    entry = found.entries[0]
    assert (entry.stopped, entry.evaluation) == ("finished", None)
    assert "tasks have no finite score after 300 inner steps" in entry.error
    assert "MAML diverged: " in found.table()
    assert found.entries[1].evaluation


# The command


def command(out: Path, *options: str) -> list[str]:
    small = ["--hidden", "4", "--meta-batch", "2", "--iterations", "3", "--tasks", "5"]
    return ["compare", "--data", "sinusoid", "--out", str(out), *small, *options]


def test_the_command_prints_learners_and_table(tmp_path, capsys):
    assert cli.main(command(tmp_path, "--algorithms", "maml", "fomaml")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert [line.partition(":")[0] for line in lines[:2]] == ["MAML", "FOMAML"]
    page = (tmp_path / "comparison.md").read_text()
    assert "\n".join(lines[3:-2]) in page
    assert lines[-1] == (
        f"Table and commands: {tmp_path}/comparison.md, picture: {tmp_path}/comparison.png"
    )


@pytest.mark.rotating
def test_the_command_goes_on_without_options(tmp_path, capsys):
    options = ("--algorithms", "maml", "fomaml", "--iterations", "1000000")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmeta", *command(tmp_path, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "maml" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    again = f"python -m fastmeta compare --out {tmp_path} --resume"
    assert out.endswith(f"Stopped by SIGTERM. Continue with: {again}\n")
    taken = str(learners(tmp_path)["maml"]["iterations"] + 2)
    assert cli.main([*again.split()[3:], "--iterations", taken]) == 0
    assert f"MAML: {int(taken):,} iterations" in capsys.readouterr().out
    assert learners(tmp_path)["fomaml"]["options"]["hidden"] == 4
    assert learners(tmp_path)["fomaml"]["evaluation"]["tasks"] == 5
