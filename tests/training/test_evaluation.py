"""Evaluation: the interval's formula, the tasks it draws, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import fastmeta as fm
from fastmeta.data import ClassImages, Episodes, Sinusoid
from fastmeta.training import evaluation
from fastmeta.training.config import TrainConfig
from fastmeta.training.evaluation import (
    Evaluation,
    Evaluator,
    evaluate_run,
    mean_interval,
    query_scores,
)
from fastmeta.training.loop import train


class Recorder(nn.Module):
    """A learner that answers zero and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.support, self.steps, self.modes, self.grad = [], [], [], []

    def adapt_tasks(self, support_x, support_y, steps=None):
        self.support.append(support_x)
        self.steps.append(steps)
        self.modes.append(self.training)
        self.grad.append(torch.is_grad_enabled())
        return torch.zeros_like


def images(classes: int = 30) -> ClassImages:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (classes, 1, 1, 16, 16), generator=generator)
    return ClassImages(patterns.expand(-1, 8, -1, -1, -1).to(torch.uint8).contiguous())


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Data come from memory; the specs asked for are kept."""
    specs = []

    def from_spec(spec, split, protocol, min_images):
        specs.append((spec, split, protocol))
        return Sinusoid() if spec == "sinusoid" else images()

    monkeypatch.setattr(evaluation, "from_spec", from_spec)
    return specs


@pytest.fixture
def protonet(tmp_path, asked):
    sizes = {"hidden": 4, "queries": 3, "iterations": 1}
    train(TrainConfig("protonet", "omniglot:x", str(tmp_path), **sizes), source=images())
    return tmp_path


@pytest.fixture
def sinusoid(tmp_path, asked):
    train(TrainConfig("maml", "sinusoid", str(tmp_path), hidden=8, iterations=1, eval_steps=2))
    return tmp_path


def test_the_interval_by_hand():
    # Scores 1, 2, 3, 4: mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, over n - 1 = 3.
    mean, interval = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert interval == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-12)


def test_scores_by_hand():
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert query_scores(logits, torch.tensor([[1, 1], [1, 1]])).tolist() == [0.5, 1.0]
    predictions = torch.tensor([[[1.0], [2.0]]])
    assert query_scores(predictions, torch.tensor([[[0.0], [5.0]]])).tolist() == [5.0]


def test_the_evaluator_scores_exactly_the_tasks_asked_for(monkeypatch):
    monkeypatch.setattr(evaluation, "_EXAMPLES_A_CHUNK", 80)
    learner = Recorder()
    found = Evaluator(Sinusoid(), 1, 10, 10, tasks=10)(learner, steps=3)
    assert [len(x) for x in learner.support] == [4, 4, 2]
    assert learner.steps == [3, 3, 3]
    episodes = Episodes(Sinusoid(), 1, 10, 10, tasks=4)
    first = evaluation.EVALUATION_STREAM
    y = torch.cat([episodes[first + i].query_y for i in range(3)])[:10]
    mean, interval = mean_interval(y.square().mean((1, 2)))
    assert found == Evaluation("mse", pytest.approx(mean), pytest.approx(interval), 10)


def test_the_evaluator_runs_in_eval_mode_without_a_graph():
    learner = Recorder().train()
    Evaluator(Sinusoid(), 1, 10, 10, tasks=2)(learner)
    assert learner.modes == [False]
    assert learner.grad == [False]
    assert learner.training


def test_tasks_that_diverge_are_counted():
    class Diverging(Recorder):
        def adapt_tasks(self, support_x, support_y, steps=None):
            return lambda query_x: torch.full_like(query_x, math.inf)

    evaluator = Evaluator(Sinusoid(), 1, 5, 5, tasks=7)
    with pytest.raises(FloatingPointError, match="7 of 7 tasks have no finite score after 10"):
        evaluator(Diverging(), steps=10)


def test_streams_of_one_seed_do_not_meet():
    episodes = Episodes(Sinusoid(), 1, 2, 2, tasks=1)
    indices = (0, evaluation.VALIDATION_STREAM, evaluation.EVALUATION_STREAM)
    assert len({episodes[index].support_x.sum().item() for index in indices}) == 3


def test_one_task_has_no_interval():
    with pytest.raises(ValueError, match="tasks: expected at least 2 for an interval, got 1"):
        Evaluator(Sinusoid(), 1, 10, 10, tasks=1)


def test_a_protonet_run_is_scored_on_its_evaluation_split(protonet, asked):
    found = evaluate_run(protonet)
    assert asked == [("omniglot:x", "evaluation", "official")]
    assert (found.score, found.tasks, found.ways, found.shots, found.queries) == (
        *("accuracy", 600, 5, 1, 3),
    )
    assert str(found).startswith(
        "ProtoNet on omniglot, 5-way 1-shot, 600 evaluation tasks: accuracy "
    )
    record = json.loads((protonet / "eval.json").read_text())
    assert record["mean"] == found.mean
    assert record["interval"] == found.interval
    assert record["iteration"] == 1


def test_the_score_is_the_trained_learner_s(protonet):
    learner = fm.ProtoNet(fm.models.Conv4(4, None, in_channels=1, image_size=16))
    state = torch.load(protonet / "checkpoint.pt", weights_only=True)["learner"]
    learner.load_state_dict(state)
    evaluator = Evaluator(images(), 5, 1, 3, tasks=600)
    assert evaluator(learner).mean == evaluate_run(protonet).mean


def test_a_regression_run_is_scored_after_its_steps(sinusoid):
    found = evaluate_run(sinusoid, tasks=20)
    assert str(found).startswith(
        "MAML on sinusoid, 10-shot, inner steps 2, 20 evaluation tasks: MSE "
    )
    assert found.mean != evaluate_run(sinusoid, tasks=20, steps=5).mean
    assert found.mean == evaluate_run(sinusoid, tasks=20, steps=2).mean


@pytest.mark.parametrize(
    ("option", "value"),
    [("tasks", 7), ("shots", 4), ("queries", 4), ("seed", 3), ("steps", 0)],
)
def test_options_change_the_score(sinusoid, option, value):
    usual = evaluate_run(sinusoid, tasks=10)
    changed = evaluate_run(sinusoid, **{"tasks": 10, option: value})
    assert getattr(changed, option) == value
    assert usual.mean != changed.mean


def test_a_protonet_is_scored_on_other_ways_and_data(protonet, asked):
    found = evaluate_run(protonet, tasks=5, ways=3, data="glyphs")
    assert asked[-1] == ("glyphs", "evaluation", "official")
    assert (found.ways, found.data) == (3, "glyphs")
    assert str(found).startswith("ProtoNet on omniglot, evaluated on glyphs, 3-way 1-shot, 5 eval")


def test_what_does_not_fit_the_run_is_refused(protonet):
    with pytest.raises(ValueError, match="steps: a ProtoNet takes no inner steps, got 2"):
        evaluate_run(protonet, steps=2)
    with pytest.raises(ValueError, match="a run on omniglot:x cannot be evaluated on sinusoid"):
        evaluate_run(protonet, data="sinusoid")
    with pytest.raises(ValueError, match="ways: expected at most the 30 classes"):
        evaluate_run(protonet, ways=31)
    with pytest.raises(ValueError, match="device: expected a device of this machine, got 'abacus'"):
        evaluate_run(protonet, device="abacus")


def test_the_ways_of_a_maml_are_its_head_s(tmp_path, asked):
    sizes = {"hidden": 4, "iterations": 1, "meta_batch": 2, "queries": 2}
    train(TrainConfig("maml", "glyphs", str(tmp_path), **sizes), source=images())
    assert evaluate_run(tmp_path, tasks=2, ways=5).ways == 5
    with pytest.raises(ValueError, match="ways: this MAML's head has 5 classes, got 3"):
        evaluate_run(tmp_path, tasks=2, ways=3)


def test_a_missing_or_unsaved_run_is_named(protonet):
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        evaluate_run(protonet / "none")
    (protonet / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        evaluate_run(protonet)
