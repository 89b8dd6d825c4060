"""Scores of heads on stored features, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmeta import heads
from fastmeta.core.checks import check_choice
from fastmeta.data import Episode, Episodes, Features
from fastmeta.heads import Head
from fastmeta.training.evaluation import EVALUATION_STREAM, mean_interval, query_scores
from fastmeta.training.files import write_atomically

# In the order of the table. FEAT is left out, as it has parameters to train.
HEADS: dict[str, Callable[[], Head]] = {
    "nearest": lambda: heads.NearestCentroid(),
    "simpleshot": lambda: heads.SimpleShot(),
    "ridge": lambda: heads.Ridge(),
    "logistic": lambda: heads.Logistic(),
    "soft-kmeans": lambda: heads.SoftKMeans(scale=10.0, normalize=True),
    "bd-cspn": lambda: heads.BDCSPN(),
    "laplacian": lambda: heads.LaplacianShot(),
    "pt-map": lambda: heads.PTMAP(),
    "tim": lambda: heads.TIM(),
    "finetuning": lambda: heads.TransductiveFinetuning(),
}

_TASKS_A_CHUNK = 32  # so that the features of a chunk stay in the cache
_ELEMENTS_A_CHUNK = 1 << 24  # of the features of a chunk, for large tasks


@dataclass(frozen=True)
class HeadScores:
    """Accuracies of heads on the same tasks.

    Attributes:
        ways, queries, tasks, seed: of the tasks.
        shots: the numbers of shots, a column of the table each.
        scores: mean and half the 95 % interval, fractions, of each head and number of shots.
    """

    ways: int
    shots: tuple[int, ...]
    queries: int
    tasks: int
    seed: int
    scores: dict[str, dict[int, tuple[float, float]]]

    def table(self) -> str:
        """The table in Markdown, with what it was measured on."""
        rows = [["head", *(f"{self.ways}-way {shots}-shot" for shots in self.shots)]]
        rows.append(["---"] * len(rows[0]))
        for name, scores in self.scores.items():
            mark = " (transductive)" if HEADS[name]().transductive else ""
            cells = [f"{100 * mean:.2f} ± {100 * half:.2f}" for mean, half in scores.values()]
            rows.append([f"{name}{mark}", *cells])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        about = (
            f"Accuracy in percent, mean and 95 % interval over {self.tasks:,} tasks of "
            f"{self.queries} queries a class, seed {self.seed}; all heads on the same tasks. "
            "A transductive head sees all queries of a task together, in balanced classes: its "
            "accuracy does not compare with an inductive head's."
        )
        return f"{lines}\n\n{about}\n"


def score_heads(
    source: Features,
    *,
    ways: int = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    tasks: int = 10_000,
    names: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
) -> HeadScores:
    """Score heads on tasks that are drawn from stored features.

    Args:
        source: the features.
        ways, queries: sizes of a task; queries of each class.
        shots: numbers of support examples of each class; each has tasks of its own.
        tasks: number of tasks, at least 2.
        names: names of HEADS; None: all.
        seed: seed of the tasks.
        device: where heads compute.
        out: file that the table is written to, completely or not at all; its folder is made.

    Raises:
        ValueError: a head is unknown, there are fewer than two tasks, or the features have too few
            classes or examples.
        FloatingPointError: a head gives logits that are not numbers.

    Example:
        >>> import torch
        >>> from fastmeta.data import Features
        >>> features = Features(torch.eye(6).repeat(4, 1), torch.arange(6).repeat(4))
        >>> found = score_heads(features, shots=[1], queries=3, tasks=2, names=["ridge"])
        >>> found.scores
        {'ridge': {1: (1.0, 0.0)}}
    """
    chosen = list(dict.fromkeys(check_choice("heads", name, HEADS) for name in names or HEADS))
    if tasks < 2:
        raise ValueError(f"tasks: expected at least 2 for an interval, got {tasks}")
    scores: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in chosen}
    for number in dict.fromkeys(shots):
        source.check(ways, number, queries)  # before the first task of any
    for number in dict.fromkeys(shots):
        size = ways * (number + queries) * source.features.shape[1]
        chunk = max(1, min(_TASKS_A_CHUNK, _ELEMENTS_A_CHUNK // max(1, size)))
        episodes = Episodes(source, ways, number, queries, chunk, seed, device)
        found = _accuracies(episodes, tasks, {name: HEADS[name]() for name in chosen})
        for name, values in found.items():
            scores[name][number] = mean_interval(values)
    result = HeadScores(ways, tuple(dict.fromkeys(shots)), queries, tasks, seed, scores)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: file.write(result.table().encode()))
    return result


@torch.no_grad()
def _accuracies(episodes: Episodes, tasks: int, chosen: dict[str, Head]) -> dict[str, torch.Tensor]:
    """Accuracy of each head on each task ``[tasks]``."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in chosen}
    assert isinstance(episodes.ways, int)
    for episode in _chunks(episodes, tasks):
        for name, head in chosen.items():
            logits = head(episode.support_x, episode.support_y, episode.query_x, episodes.ways)
            if bool(logits.isnan().any()):
                raise FloatingPointError(f"{name}: some logits are not numbers")
            parts[name].append(query_scores(logits, episode.query_y))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def _chunks(episodes: Episodes, tasks: int) -> Iterator[Episode]:
    for index in range(math.ceil(tasks / episodes.tasks)):
        episode = episodes[EVALUATION_STREAM + index]
        yield Episode(*(x[: tasks - index * episodes.tasks] for x in episode))
