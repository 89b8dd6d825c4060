"""The scores of heads on stored features, and the command that prints them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmeta as fm
from fastmeta import cli
from fastmeta.data import Episodes, Features
from fastmeta.training.evaluation import EVALUATION_STREAM, mean_interval, query_scores
from fastmeta.training.head_scores import HEADS, score_heads

SIZES = {"ways": 3, "queries": 4, "tasks": 40}


def features(noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(10)
    means = torch.randn(8, 6, generator=generator)
    return Features(means[labels] + noise * torch.randn(80, 6, generator=generator), labels)


def test_scores_are_means_over_the_tasks():
    found = score_heads(features(), shots=[2], names=["nearest"], **SIZES)
    episodes = Episodes(features(), 3, 2, 4, tasks=32)
    scores = []
    for index in (0, 1):
        episode = episodes[EVALUATION_STREAM + index]
        logits = fm.heads.NearestCentroid()(*episode[:3])
        scores.append(query_scores(logits, episode.query_y))
    assert found.scores["nearest"][2] == mean_interval(torch.cat(scores)[:40])


def test_all_heads_solve_easy_tasks():
    found = score_heads(features(0.05), shots=[1, 3], **SIZES)
    assert list(found.scores) == list(HEADS)
    assert all(mean > 0.9 for scores in found.scores.values() for mean, _ in scores.values())


def test_the_table_marks_transductive_heads():
    table = score_heads(features(), shots=[1], names=["ridge", "tim"], **SIZES).table()
    assert "| head | 3-way 1-shot |" in table and "\n| ridge | " in table
    assert "\n| tim (transductive) | " in table and "40 tasks of 4 queries a class" in table


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    source = features()
    np.savez(tmp_path / "f.npz", x=source.features.numpy(), y=np.repeat(np.arange(8), 10))
    out = tmp_path / "tables" / "heads.md"
    words = f"heads --features {tmp_path}/f.npz --ways 3 --shots 1 2 --queries 4 --tasks 40"
    assert cli.main([*words.split(), "--heads", "ridge", "tim", "--out", str(out)]) == 0
    expected = score_heads(source, shots=[1, 2], names=["ridge", "tim"], **SIZES).table()
    assert capsys.readouterr().out == expected == out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["heads.md"]


WRONG = [
    (["--heads", "knn"], "heads: expected one of nearest, "),
    (["--tasks", "1"], "tasks: expected at least 2"),
    (["--ways", "9"], "ways: expected at most the 8 classes"),
    (["--shots", "1", "9"], "shots + queries: expected at most the 10 examples"),
]


@pytest.mark.parametrize("words, message", WRONG)
def test_wrong_options(words, message, tmp_path, capsys):
    source = features()
    np.savez(tmp_path / "f.npz", x=source.features.numpy(), y=np.repeat(np.arange(8), 10))
    given = ["--features", f"{tmp_path}/f.npz", "--queries", "4", "--tasks", "4", *words]
    assert cli.main(["heads", *given]) == 2
    assert f"fastmeta: {message}" in capsys.readouterr().err


def test_a_missing_file(capsys):
    assert cli.main(["heads", "--features", "gone.npz"]) == 2
    assert capsys.readouterr().err == "fastmeta: features: there is no file gone.npz\n"
