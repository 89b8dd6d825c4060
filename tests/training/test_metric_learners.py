"""Runs of learners that compare embeddings: options, checkpoints, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmeta as fm
from fastmeta.training import evaluation
from fastmeta.training.config import TrainConfig
from fastmeta.training.evaluation import evaluate_run
from fastmeta.training.learner_factory import build_learner
from fastmeta.training.learner_options import METRIC_LEARNERS
from fastmeta.training.loop import Result, train
from fastmeta.training.run_folder import load_run
from tests.helpers.runs import TINY, equal, images, without_seconds

NEW = [name for name in METRIC_LEARNERS if name != "protonet"]
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "matching": ("matching", {}),
    "matching with a context": ("matching", {"context_steps": 2}),
    "siamese": ("siamese", {}),
    "siamese, contrastive": ("siamese", {"loss": "contrastive"}),
    "relation": ("relation", {}),
    "relation, batch": ("relation", {"norm_statistics": "batch"}),
}


def config(kind: str, out: Path, **options: Any) -> TrainConfig:
    algorithm, own = RUNS[kind]
    return TrainConfig(algorithm, "images", str(out), **{**TINY, **own, **options})


def run(config: TrainConfig, **how: Any) -> Result:
    return train(config, source=images(size=28), **how)


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    options = {"eval_every": 4, "eval_tasks": 2}
    straight = run(config(kind, tmp_path / "a", iterations=8, **options))
    run(config(kind, tmp_path / "b", iterations=4, **options))
    resumed = run(config(kind, tmp_path / "b", iterations=8, **options), resume=True)
    assert equal(straight, resumed)
    assert without_seconds(straight.metrics) == without_seconds(resumed.metrics)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_scored_on_other_ways(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(evaluation, "from_spec", lambda *args, **how: images(seed=1, size=28))
    run(config(kind, tmp_path))
    found = evaluate_run(tmp_path, tasks=5, ways=3)
    batch = kind == "relation, batch"
    assert str(found).endswith(" (transductive)" if batch else " %")
    assert json.loads((tmp_path / "eval.json").read_text())["transductive"] is batch
    name = type(load_run(tmp_path).learner).__name__
    with pytest.raises(ValueError, match=f"steps: a {name} takes no inner steps, got 2"):
        evaluate_run(tmp_path, steps=2)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("matching", "metric", "sqeuclidean"),
        ("matching", "scale", 1.0),
        ("matching", "context_steps", 1),
        ("matching with a context", "context_steps", 1),
        ("siamese", "loss", "contrastive"),
        ("siamese, contrastive", "margin", 3.0),
        ("relation", "loss", "cross_entropy"),
        ("relation", "train_ways", 7),
    ],
)
def test_options_change_the_training(tmp_path, kind, option, value):
    usual = run(config(kind, tmp_path / "a"))
    changed = run(config(kind, tmp_path / "b", **{option: value}))
    assert usual.metrics[-1]["loss"] != changed.metrics[-1]["loss"]


def test_options_of_use_arrive(tmp_path):
    learner = build_learner(config("siamese", tmp_path, reduce="mean"), [1, 28, 28])
    assert isinstance(learner, fm.SiameseNet) and learner.reduce == "mean"
    learner = build_learner(config("relation", tmp_path, aggregate="mean"), [1, 28, 28])
    assert isinstance(learner, fm.RelationNet) and learner.aggregate == "mean"
    learner = build_learner(config("matching with a context", tmp_path), [1, 28, 28])
    assert isinstance(learner, fm.MatchingNet) and learner.context.steps == 2


@pytest.mark.parametrize("kind", ["matching", "siamese", "relation"])
def test_training_learns(tmp_path, kind):
    # A relation network has to learn the comparison, too.
    iterations = 120 if kind == "relation" else 40
    options = {"hidden": 8, "iterations": iterations, "lr": 0.01, "train_ways": 5}
    metrics = run(config(kind, tmp_path, **options)).metrics
    early, late = (sum(m["accuracy"] for m in part) / 10 for part in (metrics[:10], metrics[-10:]))
    assert late > early + 0.2


def test_usual_values():
    for algorithm, ways, queries in (("matching", 20, 5), ("siamese", 20, 5), ("relation", 5, 15)):
        found = TrainConfig(algorithm, "glyphs", "x")
        assert (found.train_ways, found.queries, found.meta_batch) == (ways, queries, 2)
    assert TrainConfig("relation", "glyphs", "x").pool is None


def test_relation_needs_images_of_some_size(tmp_path):
    with pytest.raises(ValueError, match="data: relation needs images of 22 x 22 pixels or more"):
        build_learner(config("relation", tmp_path), [1, 21, 21])
    assert build_learner(config("relation", tmp_path), [1, 22, 22])


@pytest.mark.parametrize("algorithm", NEW)
def test_weights_are_drawn_from_torch_s_generator(tmp_path, algorithm):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        learner = build_learner(config(algorithm, tmp_path), [1, 28, 28])
        states.append(torch.cat([p.flatten() for p in learner.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
