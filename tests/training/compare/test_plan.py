"""The options of a comparison's learners: every one arrives, at all learners or at its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastmeta import cli
from fastmeta.training import compare
from fastmeta.training.compare.plan import parse_settings, plan
from fastmeta.training.compare.report import Comparison, Entry
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import ALGORITHMS, METRIC_LEARNERS, OF_SOME_LEARNERS
from tests.helpers.command_options import OPTIONS as CASES

OUT = Path("x")
OF_SOME = set(OF_SOME_LEARNERS)


@pytest.fixture
def arrived(monkeypatch):
    """The configs and the keywords that the comparison is called with; nothing is trained."""
    calls = []

    def keep(configs, out, **how):
        assert how.pop("report")
        calls.append((configs, out, how))
        return Comparison([Entry(config, config.algorithm) for config in configs], 5, trained=True)

    monkeypatch.setattr(compare, "compare", keep)
    return calls


def command(*options: str) -> list[str]:
    return ["compare", "--data", "glyphs", "--out", "x", *options]


COMMON = [(option, expected) for _, option, expected in CASES if not OF_SOME & set(expected)]


@pytest.mark.parametrize(("option", "expected"), COMMON)
def test_common_options_arrive_at_every_learner(arrived, option, expected):
    assert cli.main(command("--algorithms", "fomaml", "protonet", *option.split())) == 0
    assert arrived[0][0] == [
        TrainConfig(algorithm, "glyphs", f"x/{algorithm}", **expected)
        for algorithm in ("fomaml", "protonet")
    ]


def test_no_common_option_is_forgotten():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    tested = {name for _, expected in COMMON for name in expected}
    assert tested == names - OF_SOME - {"algorithm", "data", "out"}


OWN = [case for case in CASES if OF_SOME & set(case[2])]


@pytest.mark.parametrize(("algorithm", "option", "expected"), OWN)
def test_an_option_of_one_learner_arrives_there_alone(arrived, algorithm, option, expected):
    name, _, value = option.removeprefix("--").partition(" ")
    cli.main(command("--set", f"{algorithm}.{name}={value or 'true'}"))
    usual = {config.algorithm: config for config in plan(OUT, "glyphs")}
    own = TrainConfig(algorithm, "glyphs", f"x/{algorithm}", **expected)
    assert arrived[0][0] == list((usual | {algorithm: own}).values())


def test_own_options_come_before_common_ones(arrived):
    own = ("--set", "maml.lr=0.5", "--set", "maml.steps=2", "--set", "fomaml.steps=3")
    cli.main(command("--algorithms", "maml", "fomaml", "--lr", "0.25", *own))
    assert [(config.lr, config.steps) for config in arrived[0][0]] == [(0.5, 2), (0.25, 3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", {}), ("--tasks 7", {"tasks": 7}), ("--overwrite", {"overwrite": True})],
)
def test_the_comparison_s_own_options_arrive(arrived, options, expected):
    cli.main(command(*options.split()))
    assert arrived[0][1:] == (OUT, {"resume": False, **expected})


def test_all_learners_that_the_data_allow_are_usual():
    assert [config.algorithm for config in plan(OUT, "glyphs")] == list(ALGORITHMS)
    names = [config.algorithm for config in plan(OUT, "sinusoid")]
    assert names == [name for name in ALGORITHMS if name not in METRIC_LEARNERS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("maml.steps=2", ("maml", "steps", 2)),
        ("maml.inner_lr=2", ("maml", "inner_lr", 2.0)),
        ("maml.inner-lr=1e-3", ("maml", "inner_lr", 1e-3)),
        ("maml.first_order=false", ("maml", "first_order", False)),
        ("maml.adapt=head.*,*.bias", ("maml", "adapt", ["head.*", "*.bias"])),
        ("protonet.metric=dot", ("protonet", "metric", "dot")),
        ("protonet.time_limit=0.5", ("protonet", "time_limit", 0.5)),
    ],
)
def test_settings_have_the_types_of_the_options(text, expected):
    algorithm, option, value = expected
    found = parse_settings([text])
    assert found == {algorithm: {option: value}}
    assert type(found[algorithm][option]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=2", "set: expected ALGORITHM.OPTION=VALUE, got 'steps=2'"),
        ("maml.steps", "set: expected ALGORITHM.OPTION=VALUE, got 'maml.steps'"),
        ("maml.steps=", "set: expected ALGORITHM.OPTION=VALUE, got 'maml.steps='"),
        ("svm.steps=2", "set: expected one of .*maml, .*, got 'svm'"),
        ("maml.stepz=2", "set maml: expected one of .*steps, .*, got 'stepz'"),
        ("maml.metric=dot", "set maml: expected one of .*, got 'metric'"),
        ("reptile.adapt=head.*", "set reptile: expected one of .*, got 'adapt'"),
        ("maml.ways=3", "set maml: expected one of .*, got 'ways'"),
        ("maml.out=3", "set maml: expected one of .*, got 'out'"),
        ("maml.steps=two", "set: expected a value of type int, got 'maml.steps=two'"),
        ("maml.lr=fast", "set: expected a value of type float, got 'maml.lr=fast'"),
        ("maml.first_order=1", "set: expected true or false, got 'maml.first_order=1'"),
    ],
)
def test_a_wrong_setting_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        parse_settings([text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set maml.stepz=2", "got 'stepz'"),
        ("--set maml.steps=0", "maml: steps: expected an integer >= 1, got 0"),
        ("--set protonet.metric=l1", "protonet: metric: expected one of sqeuclidean"),
        ("--algorithms fomaml --set maml.steps=2", "set: maml is not compared, only fomaml"),
        ("--algorithms maml maml", "configs: expected each once, got maml 2 times"),
        ("--shots 0", "protonet: shots: expected an integer >= 1, got 0"),
        ("--tasks 1", "tasks: expected at least 2"),
        ("--ways 100000", "protonet: ways: expected at most the"),
        (
            "--data moon",
            "expected one of omniglot:PATH, images:PATH, glyphs, sinusoid, got 'moon'",
        ),
        ("--data sinusoid --algorithms protonet", "protonet: data: sinusoid is regression"),
        ("--resume", "holds no comparison"),
    ],
)
def test_a_wrong_command_writes_nothing(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert cli.main([*command(*options.split()), "--out", str(out)]) == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()


def test_data_are_needed(capsys):
    assert cli.main(["compare", "--out", "x"]) == 2
    assert (
        "data: give --data omniglot:PATH, images:PATH, glyphs or sinusoid"
        in capsys.readouterr().err
    )
