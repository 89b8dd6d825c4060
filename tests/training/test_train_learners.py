"""Training of MAML's relatives: what is built, every option, resuming."""

from __future__ import annotations

import math

import pytest
import torch

import fastmeta as fm
from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.evaluation import evaluate_run
from fastmeta.training.learner_factory import build_learner
from fastmeta.training.loop import TrainConfig
from fastmeta.training.run_folder import load_run
from tests.helpers.runs import equal, relative, run, without_seconds

CLASSES = {
    "fomaml": fm.FOMAML,
    "anil": fm.ANIL,
    "reptile": fm.Reptile,
    "metasgd": fm.MetaSGD,
    "mamlpp": fm.MAMLPlusPlus,
    "metacurvature": fm.MetaCurvature,
    "imaml": fm.IMAML,
}
each = pytest.mark.parametrize("algorithm", CLASSES)


@each
def test_the_learner_is_the_algorithm_s(algorithm, tmp_path):
    learner = build_learner(relative(algorithm, tmp_path, inner_lr=0.25), [1, 16, 16])
    assert type(learner) is CLASSES[algorithm]
    assert learner.steps == 2
    assert torch.as_tensor(learner.lr).flatten()[0] == 0.25


OPTIONS = [
    ("fomaml", {"learn_lr": True}, lambda learner: isinstance(learner.lr, torch.nn.Parameter)),
    ("anil", {"learn_lr": True}, lambda learner: isinstance(learner.lr, torch.nn.Parameter)),
    ("anil", {"first_order": True}, lambda learner: learner.first_order),
    ("metasgd", {"first_order": True}, lambda learner: learner.first_order),
    ("metacurvature", {"first_order": True}, lambda learner: learner.first_order),
    ("reptile", {"inner_batch": 3}, lambda learner: learner.inner_batch == 3),
    ("mamlpp", {"multi_step_iterations": 7}, lambda learner: learner.multi_step_iterations == 7),
    ("mamlpp", {"first_order_iterations": 7}, lambda learner: learner.first_order_iterations == 7),
    ("imaml", {"regularization": 0.5}, lambda learner: learner.regularization == 0.5),
    ("imaml", {"cg_steps": 2}, lambda learner: learner.cg_steps == 2),
    ("imaml", {"cg_damping": 0.5}, lambda learner: learner.cg_damping == 0.5),
    *(
        (name, {"adapt": ["head.*"]}, lambda learner: learner.layout.numel == 25)
        for name in ("fomaml", "metasgd", "mamlpp", "metacurvature", "imaml")
    ),
]


@pytest.mark.parametrize(("algorithm", "options", "holds"), OPTIONS)
def test_options_reach_the_learner(algorithm, options, holds, tmp_path):
    assert holds(build_learner(relative(algorithm, tmp_path, **options), [1, 16, 16]))
    assert not holds(build_learner(relative(algorithm, tmp_path), [1, 16, 16]))


def test_only_maml_plus_plus_has_norms_of_each_step(tmp_path):
    for algorithm in CLASSES:
        learner = build_learner(relative(algorithm, tmp_path), [1, 16, 16])
        kinds = {type(m) for m in learner.modules()}
        assert (fm.models.PerStepBatchNorm2d in kinds) is (algorithm == "mamlpp")
        assert (torch.nn.BatchNorm2d in kinds) is (algorithm != "mamlpp")
    config = TrainConfig("mamlpp", "sinusoid", str(tmp_path))
    assert build_learner(config, [1]).steps == 5  # without norms


def test_anil_s_body_is_the_network_without_its_last_layer(tmp_path):
    anil = build_learner(relative("anil", tmp_path), [1, 16, 16])
    assert (anil.head.in_features, anil.head.out_features) == (4, 5)
    regression = build_learner(TrainConfig("anil", "sinusoid", str(tmp_path)), [1])
    maml = build_learner(TrainConfig("maml", "sinusoid", str(tmp_path)), [1])
    for parameter, like in zip(regression.parameters(), maml.parameters(), strict=True):
        parameter.data.copy_(like)
    x = torch.randn(7, 1)
    assert torch.equal(regression(x), maml(x))


@pytest.mark.rotating
@each
def test_a_resumed_run_is_the_same_run(algorithm, tmp_path):
    options = {"eval_every": 4, "eval_tasks": 2}
    if algorithm == "mamlpp":  # that changes every iteration, and its order in the middle
        options |= {"multi_step_iterations": 6, "first_order_iterations": 5}
    if algorithm in ("mamlpp", "reptile"):
        options["lr_cosine"] = 8
    straight = run(relative(algorithm, tmp_path / "a", iterations=8, **options))
    run(relative(algorithm, tmp_path / "b", iterations=4, **options))
    resumed = run(relative(algorithm, tmp_path / "b", iterations=8, **options), resume=True)
    assert equal(straight, resumed)
    assert without_seconds(straight.metrics) == without_seconds(resumed.metrics)


def test_the_annealing_of_a_loaded_run_is_where_it_was(tmp_path):
    run(relative("mamlpp", tmp_path, multi_step_iterations=8))
    learner = load_run(tmp_path).learner
    assert learner.iteration == 4
    assert learner.step_weights() == [0.25, 0.75]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["learner"]["_extra_state"] == 4


def test_validation_does_not_move_the_annealing(tmp_path):
    result = run(relative("mamlpp", tmp_path, eval_every=1, eval_tasks=2))
    assert result.learner.iteration == 4


def test_the_outer_step_size_falls_by_a_cosine(tmp_path):
    seen = run(relative("fomaml", tmp_path, lr=0.08, lr_cosine=2)).metrics
    half = 0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2
    expected = [0.08, 0.08 * half, 0.0008, 0.0008]
    assert [m["lr"] for m in seen] == pytest.approx(expected, rel=1e-12)


@pytest.mark.rotating
@each
def test_a_run_is_evaluated(algorithm, tmp_path, monkeypatch):
    from fastmeta.training import evaluation
    from tests.helpers.runs import images

    monkeypatch.setattr(evaluation, "from_spec", lambda *_, **__: images())
    result = run(relative(algorithm, tmp_path))
    found = evaluate_run(tmp_path, tasks=4)
    assert (found.steps, found.tasks) == (2, 4)
    assert found.title == result.config.title
    with pytest.raises(ValueError, match="head has 5 classes, got 3"):
        evaluate_run(tmp_path, ways=3)
