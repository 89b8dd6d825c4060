"""The command line: what commands print, their exit status, and that every option arrives."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastmeta as fm
from fastmeta import cli
from fastmeta.cli import demo
from fastmeta.training import evaluation
from fastmeta.training import loop as train
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_factory import build_learner
from fastmeta.training.run_folder import load_run
from tests.helpers.command_options import OPTIONS

SMALL = ["--data", "sinusoid", "--hidden", "4", "--meta-batch", "2", "--iterations", "3"]


def sinusoid(out, *options: str) -> list[str]:
    return ["train", "maml", "--out", str(out), *SMALL, *options]


@pytest.fixture
def arrived(monkeypatch):
    """The config and the keywords that the training is called with; nothing is trained."""
    calls = []

    def keep(config, **how):
        calls.append((config, how))
        return train.Result(config, torch.nn.Identity(), 0, 0.0, "finished", [])

    monkeypatch.setattr(train, "train", keep)
    return calls


# train


@pytest.mark.parametrize(("algorithm", "option", "expected"), OPTIONS)
def test_every_option_arrives(arrived, algorithm, option, expected):
    cli.main(["train", algorithm, "--data", "glyphs", "--out", "x", *option.split()])
    assert arrived == [
        (TrainConfig(algorithm, "glyphs", "x", **expected), {"resume": False, "overwrite": False})
    ]


def test_no_option_is_forgotten():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    tested = {name for _, _, expected in OPTIONS for name in expected}
    assert tested | {"algorithm", "data", "out"} == names


def test_the_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    listed = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    names = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    assert listed == (names - {"algorithm"}) | {"debug", "resume", "overwrite"}


def test_overwrite_arrives(arrived):
    cli.main(["train", "maml", "--data", "glyphs", "--out", "x", "--overwrite"])
    assert arrived[0][1] == {"resume": False, "overwrite": True}


def test_training_says_how_it_went_and_what_is_next(tmp_path, capsys):
    assert cli.main(sinusoid(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"MAML on sinusoid: 3 of 3 iterations in [\d.]+ s\.", lines[0])
    assert re.fullmatch(
        rf"Training MSE [\d.]+, mean of the last 3; see {tmp_path}/curve.png\.", lines[1]
    )
    assert lines[2] == f"Evaluate with: python -m fastmeta eval {tmp_path}"


def test_the_progress_bar_is_quiet_without_a_terminal(tmp_path, capsys):
    cli.main(sinusoid(tmp_path))
    assert capsys.readouterr().err == ""


def test_resuming_takes_the_options_of_the_run(tmp_path, capsys):
    cli.main(sinusoid(tmp_path))
    again = ["train", "maml", "--out", str(tmp_path), "--resume", "--iterations", "5"]
    assert cli.main(again) == 0
    assert "5 of 5 iterations" in capsys.readouterr().out
    options = json.loads((tmp_path / "config.json").read_text())
    assert (options["hidden"], options["iterations"]) == (4, 5)


def test_resuming_with_other_options_is_refused(tmp_path, capsys):
    cli.main(sinusoid(tmp_path))
    assert cli.main(sinusoid(tmp_path, "--resume", "--steps", "2")) == 2
    assert "steps: the run to resume began with 1, got 2" in capsys.readouterr().err
    assert cli.main(["train", "protonet", "--out", str(tmp_path), "--resume"]) == 2
    assert "algorithm: the run to resume began with 'maml'" in capsys.readouterr().err


def test_a_run_that_adapts_some_parameters(tmp_path, capsys):
    """Its folder says which, to resuming and to the evaluation."""
    assert cli.main(sinusoid(tmp_path, "--adapt", "5.*", "3.bias")) == 0
    assert json.loads((tmp_path / "config.json").read_text())["adapt"] == ["5.*", "3.bias"]
    learner = load_run(tmp_path).learner
    assert learner.layout.names == ("3.bias", "5.weight", "5.bias")
    before = {n: p.clone() for n, p in build_learner_of(tmp_path).module.named_parameters()}
    assert all((p != before[n]).any() for n, p in learner.module.named_parameters())
    again = ["train", "maml", "--out", str(tmp_path), "--resume", "--iterations", "4"]
    assert cli.main([*again, "--adapt", "5.*"]) == 2
    assert "adapt: the run to resume began with ['5.*', '3.bias'], got" in capsys.readouterr().err
    assert cli.main(again) == 0
    assert cli.main(["eval", str(tmp_path), "--tasks", "20"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["mean"]
    run = load_run(tmp_path)
    evaluator = evaluation.Evaluator(fm.data.Sinusoid(), 1, 10, 10, tasks=20)
    assert found == evaluator(run.learner, steps=1).mean
    run.learner.adapted_names = None
    assert found != evaluator(run.learner, steps=1).mean


def build_learner_of(out):
    """The untrained learner of a run."""
    config = load_run(out).config
    torch.manual_seed(config.seed)
    return build_learner(config, [1])


def test_the_time_limit_is_no_failure(tmp_path, capsys):
    assert cli.main(sinusoid(tmp_path, "--iterations", "1000000", "--time-limit", "0.002")) == 0
    out = capsys.readouterr().out
    assert "of 1,000,000 iterations" in out
    assert "stopped by the time limit" in out
    assert f"Continue with: python -m fastmeta train maml --out {tmp_path} --resume" in out


@pytest.mark.rotating
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint_and_a_message(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmeta", *sinusoid(tmp_path, "--iterations", "100000000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in out
    assert "Continue with" in out
    assert err == ""
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["iteration"] == len(metrics.read_text().splitlines())


# eval


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--tasks 20", {"tasks": 20}),
        ("--ways 3", {"ways": 3}),
        ("--shots 4", {"shots": 4}),
        ("--queries 6", {"queries": 6}),
        ("--steps 0", {"steps": 0}),
        ("--data glyphs", {"data": "glyphs"}),
        ("--seed 9", {"seed": 9}),
        ("--device cuda", {"device": "cuda"}),
    ],
)
def test_every_evaluation_option_arrives(monkeypatch, option, expected):
    asked = []
    monkeypatch.setattr(evaluation, "evaluate_run", lambda out, **options: asked.append(options))
    cli.main(["eval", "run", *option.split()])
    assert asked == [expected]


def test_evaluation_threads_are_set(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(evaluation, "evaluate_run", lambda out: "scored")
    assert cli.main(["eval", "run", "--threads", "3"]) == 0
    assert threads == [3]
    assert cli.main(["eval", "run", "--threads", "0"]) == 2


def test_evaluation_prints_one_line_and_writes_it(tmp_path, capsys):
    cli.main(sinusoid(tmp_path))
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path), "--tasks", "30"]) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"MAML on sinusoid, 10-shot, inner steps 1, 30 evaluation tasks: MSE [\d.]+ ± [\d.]+\n",
        line,
    )
    record = json.loads((tmp_path / "eval.json").read_text())
    assert f"MSE {record['mean']:.3f} ± {record['interval']:.3f}" in line


# info


def test_info_names_versions_and_backends(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^CPU threads +\d+ of \d+$", out, re.MULTILINE)
    assert re.search(r"^environment .*\bOMP_NUM_THREADS=3\b", out, re.MULTILINE)
    for op in ("inner_update", "prototypes", "pairwise_distance", "prototype_loss", "task_program"):
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        backends = [fm.backend_of(op, torch.device("cpu"), dtype) for dtype in dtypes]
        row = next(line for line in out.splitlines() if line.startswith(op))
        assert row.split()[1:5] == backends


# demo


def test_the_demo_arrives(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "demo", lambda out, **options: asked.append((str(out), options)))
    cli.main(["demo", "--out", str(tmp_path), "--seconds", "5"])
    assert asked == [(str(tmp_path), {"seconds": 5.0})]


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train protonet --out OUT",
            "data: give --data omniglot:PATH, images:PATH, glyphs or sinusoid",
        ),
        (
            "train maml --data moon --out OUT",
            "expected one of omniglot:PATH, images:PATH, glyphs, sinusoid",
        ),
        ("train maml --data omniglot:OUT/none --out OUT", "none is not a folder"),
        ("train maml --data sinusoid --metric dot --out OUT", "metric: maml has no such option"),
        ("train maml --data sinusoid --ways 5 --out OUT", "ways: expected 1"),
        (
            "train maml --data sinusoid --out OUT --adapt head.*",
            "adapt: 'head.*' matches no trainable parameter; the trainable ones are ['1.weight', ",
        ),
        (
            "train reptile --data sinusoid --out OUT --adapt 5.*",
            "adapt: reptile has no such option",
        ),
        ("train maml --out OUT --resume", "holds no training run"),
        ("eval OUT", "holds no training run"),
        ("demo --out OUT --seconds 0", "seconds: expected a finite number above 0"),
    ],
)
def test_a_user_s_error_is_one_line_on_stderr(tmp_path, capsys, arguments, message):
    assert cli.main(arguments.replace("OUT", str(tmp_path)).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastmeta: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("fastmeta: ")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastmeta.training.loop", None)
    assert cli.main(["train", "maml", "--data", "sinusoid", "--out", "x"]) == 2
    assert "pip install 'fastmeta[train]'" in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate_run", interrupt)
    assert cli.main(["eval", "run"]) == 130
    assert capsys.readouterr().err == "fastmeta: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["train", "maml"], ["train", "svm", "--out", "x"]])
def test_a_wrong_command_line_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m fastmeta" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastmeta", "info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_package_runs_as_a_module(tmp_path):
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "fastmeta", "eval", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"fastmeta: {tmp_path} holds no training run: there is no config.json\n"
