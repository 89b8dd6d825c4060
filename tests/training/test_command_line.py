"""The command of a run: parsing it makes the same config, and it says no more than it has to."""

from __future__ import annotations

import shlex

import pytest

from fastmeta import cli
from fastmeta.training import loop as train
from fastmeta.training.command_line import train_command
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import ALGORITHMS
from tests.helpers.command_options import OPTIONS


def parsed(command: str, monkeypatch) -> TrainConfig:
    configs = []

    def keep(config, **how):
        configs.append(config)
        raise ValueError("only parsed")

    monkeypatch.setattr(train, "train", keep)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "fastmeta"]
    assert cli.main(words[3:]) == 2
    return configs[0]


CONFIGS = [
    *(TrainConfig(algorithm, "glyphs", "x") for algorithm in ALGORITHMS),
    *(TrainConfig(algorithm, "glyphs", "x", **options) for algorithm, _, options in OPTIONS),
    TrainConfig("maml", "sinusoid", "x", inner_lr=0.4),
    TrainConfig("maml", "omniglot:a folder's/data $HOME", "runs/of mine"),
    TrainConfig("maml", "glyphs", "x", steps=3, eval_steps=1),
    TrainConfig("protonet", "glyphs", "x", ways=7, train_ways=5),
    TrainConfig("mamlpp", "glyphs", "x", lr_cosine=0),
    TrainConfig("mamlpp", "glyphs", "x", iterations=7, lr_cosine=9),
    TrainConfig("reptile", "glyphs", "x", steps=50, lr=1e-7),
    TrainConfig("maml", "glyphs", "x", adapt=("*.1.*", "head.bias"), seed=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_command_makes_the_same_run(config, monkeypatch):
    assert parsed(train_command(config), monkeypatch) == config


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        ("reptile", {}, ""),
        ("maml", {"ways": 5, "learn_lr": False}, ""),
        ("maml", {"steps": 3}, "--steps 3 "),
        ("maml", {"steps": 3, "eval_steps": 3}, "--steps 3 "),
        ("maml", {"steps": 3, "eval_steps": 1}, "--steps 3 --eval-steps 1 "),
        ("protonet", {"ways": 7, "train_ways": 7}, "--ways 7 "),
        ("mamlpp", {"iterations": 7, "lr_cosine": 7}, "--iterations 7 "),
        ("maml", {"adapt": "head.*"}, "--adapt 'head.*' "),
        ("fomaml", {"learn_lr": True, "time_limit": 0.5}, "--learn-lr --time-limit 0.5 "),
    ],
)
def test_usual_options_are_left_out(algorithm, options, expected):
    config = TrainConfig(algorithm, "glyphs", "runs/x", **options)
    assert train_command(config) == (
        f"python -m fastmeta train {algorithm} --data glyphs {expected}--out runs/x"
    )
