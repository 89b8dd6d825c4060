"""Options of a run: usual values, ranges, which belong to which algorithm, and their file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastmeta.training.config import CHANGEABLE, TrainConfig, check_same_run, read_options


@pytest.mark.parametrize(
    ("algorithm", "data", "expected"),
    [
        ("protonet", "glyphs", {"ways": 5, "shots": 1, "queries": 15, "hidden": 64}),
        ("protonet", "glyphs", {"meta_batch": 4, "train_ways": 5, "metric": "sqeuclidean"}),
        ("protonet", "glyphs", {"steps": None, "inner_lr": None}),
        ("maml", "omniglot:x", {"ways": 5, "shots": 1, "queries": 15, "hidden": 64}),
        ("maml", "omniglot:x", {"meta_batch": 16, "steps": 1, "eval_steps": 1, "inner_lr": 0.4}),
        ("maml", "omniglot:x", {"train_ways": None, "metric": None}),
        ("maml", "sinusoid", {"ways": 1, "shots": 10, "queries": 10, "hidden": 40}),
        ("maml", "sinusoid", {"meta_batch": 25, "inner_lr": 0.01}),
        ("maml", "glyphs", {"lr_cosine": None, "inner_batch": None, "cg_steps": None}),
        ("fomaml", "glyphs", {"meta_batch": 16, "steps": 5, "eval_steps": 5, "inner_lr": 0.1}),
        ("anil", "glyphs", {"meta_batch": 16, "steps": 5, "eval_steps": 5, "inner_lr": 0.1}),
        ("metasgd", "glyphs", {"steps": 1, "eval_steps": 1, "inner_lr": 0.4}),
        ("metacurvature", "sinusoid", {"steps": 1, "inner_lr": 0.01, "ways": 1}),
        ("reptile", "glyphs", {"steps": 5, "eval_steps": 50, "inner_lr": 0.001}),
        ("reptile", "sinusoid", {"inner_lr": 0.001, "inner_batch": 10}),
        ("reptile", "glyphs", {"optimizer": "sgd", "lr": 1.0, "lr_cosine": 2000}),
        ("protonet", "glyphs", {"optimizer": "adam", "lr": 0.001, "lr_cosine": None}),
        ("mamlpp", "glyphs", {"steps": 5, "eval_steps": 5, "inner_lr": 0.1, "lr_cosine": 2000}),
        ("mamlpp", "glyphs", {"multi_step_iterations": 1000, "first_order_iterations": 0}),
        ("imaml", "glyphs", {"steps": 16, "regularization": 2.0, "cg_steps": 5, "cg_damping": 1}),
    ],
)
def test_usual_values(algorithm, data, expected):
    options = dataclasses.asdict(TrainConfig(algorithm, data, "out"))
    assert {name: options[name] for name in expected} == expected


def test_usual_values_follow_the_options_given():
    assert TrainConfig("protonet", "glyphs", "out", ways=7).train_ways == 7
    assert TrainConfig("maml", "glyphs", "out", steps=3).eval_steps == 3
    assert TrainConfig("maml", "glyphs", "out", steps=3, eval_steps=0).eval_steps == 0
    assert TrainConfig("reptile", "glyphs", "out", steps=3).eval_steps == 50
    assert TrainConfig("mamlpp", "glyphs", "out", iterations=7).lr_cosine == 7
    assert TrainConfig("mamlpp", "glyphs", "out", lr_cosine=0).lr_cosine == 0
    assert TrainConfig("mamlpp", "glyphs", "out", lr_halve_every=9).lr_cosine is None
    assert TrainConfig("maml", "glyphs", "out", optimizer="sgd").lr == 1.0
    assert TrainConfig("maml", "glyphs", "out", optimizer="sgd").lr_cosine is None
    adam = TrainConfig("reptile", "glyphs", "out", optimizer="adam")
    assert (adam.lr, adam.lr_cosine) == (0.001, None)


def test_a_config_says_what_it_is():
    config = TrainConfig("protonet", "omniglot:data/omniglot", "out")
    assert (config.title, config.score, config.regression) == (
        *("ProtoNet on omniglot", "accuracy", False),
    )
    config = TrainConfig("maml", "sinusoid", "out")
    assert (config.title, config.score, config.regression) == ("MAML on sinusoid", "mse", True)


def test_every_option_but_the_changeable_must_stay():
    begun = dataclasses.asdict(TrainConfig("maml", "glyphs", "out"))
    assert set(begun) >= CHANGEABLE
    for name in begun:
        changed = {name: "another"}
        if name in CHANGEABLE:
            check_same_run(changed, begun)
        else:
            with pytest.raises(ValueError, match=f"{name}: the run to resume began with"):
                check_same_run(changed, begun)


@pytest.mark.parametrize(
    ("algorithm", "data", "options", "message"),
    [
        ("proto", "glyphs", {}, "algorithm: .*protonet, .*, maml, .*, got 'proto'"),
        ("protonet", "sinusoid", {}, "data: sinusoid is regression"),
        ("maml", "glyphs", {"pool": "mean"}, "pool: .*max, stride, got 'mean'"),
        ("maml", "sinusoid", {"pool": "max"}, "pool: the network for sinusoid has no such option"),
        ("maml", "glyphs", {"metric": "dot"}, "metric: maml has no such option"),
        ("maml", "glyphs", {"train_ways": 9}, "train_ways: maml has no such option"),
        ("relation", "sinusoid", {}, "data: sinusoid is regression, which relation cannot do"),
        ("relation", "glyphs", {"pool": "max"}, "pool: the network for relation has no such"),
        ("relation", "glyphs", {"loss": "bce"}, "loss: .* mse, cross_entropy, got 'bce'"),
        ("siamese", "glyphs", {"loss": "mse"}, "loss: .* bce, contrastive, got 'mse'"),
        ("siamese", "glyphs", {"loss": "l1"}, "loss: expected one of bce, .*, got 'l1'"),
        ("siamese", "glyphs", {"margin": -1.0}, "margin: expected a finite number above 0, got -1"),
        ("matching", "glyphs", {"scale": 0.0}, "scale: expected a finite number above 0, got 0"),
        ("matching", "glyphs", {"context_steps": -1}, "context_steps: expected an integer >= 0"),
        ("matching", "glyphs", {"steps": 1}, "steps: matching has no such option"),
        ("protonet", "glyphs", {"scale": 2.0}, "scale: protonet has no such option"),
        ("protonet", "glyphs", {"steps": 1}, "steps: protonet has no such option"),
        ("protonet", "glyphs", {"eval_steps": 1}, "eval_steps: protonet has no such option"),
        ("protonet", "glyphs", {"inner_lr": 0.1}, "inner_lr: protonet has no such option"),
        ("protonet", "glyphs", {"first_order": True}, "first_order: protonet has no such option"),
        ("protonet", "glyphs", {"learn_lr": True}, "learn_lr: protonet has no such option"),
        ("protonet", "glyphs", {"metric": "l1"}, "metric: .*sqeuclidean.*got 'l1'"),
        ("protonet", "glyphs", {"ways": 1}, "ways: expected an integer >= 2, got 1"),
        ("protonet", "glyphs", {"shots": 0}, "shots: expected an integer >= 1, got 0"),
        ("protonet", "glyphs", {"queries": 0}, "queries: expected an integer >= 1, got 0"),
        ("protonet", "glyphs", {"train_ways": 1}, "train_ways: expected an integer >= 2, got 1"),
        ("maml", "glyphs", {"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ("maml", "glyphs", {"lr": 0.0}, "lr: expected a finite number above 0, got 0.0"),
        ("maml", "glyphs", {"inner_lr": float("inf")}, "inner_lr: expected a finite number"),
        ("maml", "glyphs", {"seed": -1}, "seed: expected an integer >= 0"),
        ("maml", "glyphs", {"threads": 0}, "threads: expected an integer >= 1, got 0"),
        ("maml", "glyphs", {"protocol": "mine"}, "protocol: .*official, paper, got 'mine'"),
        (
            "maml",
            "glyphs",
            {"device": "abacus"},
            "device: expected a device of this machine, got 'abacus'",
        ),
        ("maml", "glyphs", {"time_limit": -1.0}, "time_limit: expected a finite number above 0"),
        ("maml", "glyphs", {"eval_tasks": 1}, "eval_tasks: expected an integer >= 2, got 1"),
        ("maml", "glyphs", {"checkpoint_every": 0}, "checkpoint_every: expected an integer >= 1"),
        ("maml", "glyphs", {"hidden": 0}, "hidden: expected an integer >= 1, got 0"),
        ("fomaml", "glyphs", {"first_order": True}, "first_order: fomaml has no such option"),
        ("reptile", "glyphs", {"learn_lr": True}, "learn_lr: reptile has no such option"),
        ("maml", "glyphs", {"inner_batch": 5}, "inner_batch: maml has no such option"),
        ("reptile", "glyphs", {"adapt": ["head.*"]}, "adapt: reptile has no such option"),
        ("anil", "glyphs", {"adapt": ["head.*"]}, "adapt: anil has no such option"),
        ("protonet", "glyphs", {"adapt": ["head.*"]}, "adapt: protonet has no such option"),
        ("maml", "glyphs", {"adapt": []}, r"adapt: expected at least one name or .*, got \[\]"),
        ("maml", "glyphs", {"cg_steps": 5}, "cg_steps: maml has no such option"),
        ("imaml", "glyphs", {"multi_step_iterations": 5}, "multi_step_iterations: imaml has no"),
        ("reptile", "glyphs", {"inner_batch": -1}, "inner_batch: expected an integer >= 1, got -1"),
        ("mamlpp", "glyphs", {"eval_steps": 6}, "eval_steps: expected an .* >= 0 and < 6, got 6"),
        ("mamlpp", "glyphs", {"multi_step_iterations": -1}, "multi_step_iterations: expected an"),
        ("mamlpp", "glyphs", {"first_order_iterations": -1}, "first_order_iterations: expected an"),
        ("imaml", "glyphs", {"regularization": -2.0}, "regularization: expected a finite number"),
        ("imaml", "glyphs", {"cg_steps": -1}, "cg_steps: expected an integer >= 0, got -1"),
        ("imaml", "glyphs", {"cg_damping": -1}, "cg_damping: expected a finite number above 0"),
        ("maml", "glyphs", {"lr_cosine": -1}, "lr_cosine: expected an integer >= 0, got -1"),
        (
            *("maml", "glyphs", {"lr_cosine": 5, "lr_halve_every": 5}),
            "lr_cosine: lr_halve_every is given too, and they exclude each other",
        ),
        ("maml", "glyphs", {"meta_batch": 0}, "meta_batch: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options(algorithm, data, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(algorithm, data, "out", **options)


def test_options_of_the_wrong_type():
    with pytest.raises(TypeError, match="lr: expected a number, got 'fast' of type str"):
        TrainConfig("maml", "glyphs", "out", lr="fast")
    with pytest.raises(TypeError, match="ways: expected an integer"):
        TrainConfig("maml", "glyphs", "out", ways=2.5)
    with pytest.raises(TypeError, match=r"adapt: expected names or patterns, got \[3\]"):
        TrainConfig("maml", "glyphs", "out", adapt=[3])


def test_a_run_from_before_an_option_was_there_is_read(tmp_path):
    config = TrainConfig("maml", "glyphs", "out")
    options = dataclasses.asdict(config)
    added = ("lr_cosine", "inner_batch", "cg_steps", "cg_damping", "optimizer", "adapt")
    older = {name: value for name, value in options.items() if name not in added}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert TrainConfig(**read_options(tmp_path)) == config
    check_same_run(options, older)
    with pytest.raises(ValueError, match="lr_cosine: the run to resume began with None, got 5"):
        check_same_run(options | {"lr_cosine": 5}, older)
    with pytest.raises(ValueError, match="optimizer: the run to resume began with 'adam', got 'sg"):
        check_same_run(options | {"optimizer": "sgd"}, older)
    reptile = dataclasses.asdict(TrainConfig("reptile", "glyphs", "out", optimizer="adam"))
    del reptile["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(reptile))
    assert TrainConfig(**read_options(tmp_path)).optimizer == "adam"


def test_a_damaged_config_is_named(tmp_path):
    for text in ("{", '{"algorithm": "maml"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_options(tmp_path)
