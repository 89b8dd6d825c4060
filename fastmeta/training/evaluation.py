"""Evaluation of a learner: its mean score over many tasks, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.data import Episode, Episodes, Source, from_spec
from fastmeta.learners.metric._episode_learner import EpisodeLearner
from fastmeta.training.files import write_json
from fastmeta.training.learner_factory import Learner
from fastmeta.training.learner_options import METRIC_LEARNERS, NAMES, REGRESSION
from fastmeta.training.run_folder import EVALUATION, load_run

# Streams of episodes with the same seed must not overlap: each starts at its own index.
VALIDATION_STREAM = 2**62

EVALUATION_STREAM = 2**63

# Examples in one forward pass, which bounds the memory.
_EXAMPLES_A_CHUNK = 1024


@dataclass(frozen=True)
class Evaluation:
    """The mean score of a learner over tasks.

    Attributes:
        score: ``"accuracy"``, a fraction, or ``"mse"``.
        mean: mean over tasks.
        interval: half the width of the 95 % confidence interval of the mean.
        tasks: number of tasks.
        transductive: whether norms of a learner that otherwise scores each query by itself took the
            statistics of the queries, as with ``norm_statistics="batch"``.
    """

    score: str
    mean: float
    interval: float
    tasks: int
    transductive: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        found = f"accuracy {self.digits} %" if self.score == "accuracy" else f"MSE {self.digits}"
        return f"{found}{self.note}"

    @property
    def note(self) -> str:
        """What a table must say beside the score; empty if nothing."""
        return " (transductive)" if self.transductive else ""

    @property
    def digits(self) -> str:
        """Mean and interval as text; an accuracy in percent."""
        if self.score == "accuracy":
            return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f}"
        return f"{self.mean:.3f} ± {self.interval:.3f}"


@dataclass(frozen=True)
class RunEvaluation(Evaluation):
    """The mean score of a trained run over evaluation tasks, with their sizes.

    Attributes:
        title: learner and training data in words.
        data: source of the tasks.
        ways, shots, queries: sizes of a task.
        steps: inner steps; ``None`` for a learner without, such as a ProtoNet.
        seed: seed of the tasks.
        iteration: outer steps of the training so far.
    """

    title: str
    data: str
    ways: int
    shots: int
    queries: int
    steps: int | None
    seed: int
    iteration: int

    def __str__(self) -> str:
        task = f"{self.shots}-shot" if self.score == "mse" else f"{self.ways}-way {self.shots}-shot"
        steps = "" if self.steps is None else f", inner steps {self.steps}"
        data = self.data.partition(":")[0]
        where = "" if self.title.endswith(f" {data}") else f", evaluated on {data}"
        tasks = f"{self.tasks} evaluation tasks"
        return f"{self.title}{where}, {task}{steps}, {tasks}: {super().__str__()}"


class Evaluator:
    """A fixed set of tasks to score learners on.

    Args:
        source: source of the tasks.
        ways, shots, queries: sizes of a task.
        tasks: number of tasks, at least 2.
        seed: seed of the tasks.
        stream: index of the first episode, such as ``EVALUATION_STREAM``.
        device: device of the learner.

    Raises:
        ValueError: fewer than two tasks, whose mean has no interval; or the source has too few
            classes or examples.

    Example:
        >>> from torch import nn
        >>> import fastmeta as fm
        >>> evaluator = Evaluator(fm.data.Sinusoid(), 1, 10, 10, tasks=20)
        >>> learner = fm.MAML(fm.models.MLP([1, 8, 1]), loss=nn.MSELoss())
        >>> evaluator(learner, steps=3).tasks
        20
    """

    def __init__(
        self,
        source: Source,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        stream: int = EVALUATION_STREAM,
        device: str = "cpu",
    ) -> None:
        if tasks < 2:
            raise ValueError(f"tasks: expected at least 2 for an interval, got {tasks}")
        self.tasks = tasks
        self.stream = stream
        chunk = max(1, _EXAMPLES_A_CHUNK // max(1, ways * (shots + queries)))
        self.episodes = Episodes(source, ways, shots, queries, chunk, seed, device)

    def __call__(self, learner: Learner, steps: int | None = None) -> Evaluation:
        """Adapt ``learner`` to every task in ``eval()`` mode, and score it on the queries.

        Args:
            learner: a :class:`fastmeta.ProtoNet`, :class:`fastmeta.MAML` or relative of it.
            steps: inner steps; ``None``: the learner's own number.

        Returns:
            The mean over tasks of the accuracy, or of the squared error if labels are floats.

        Raises:
            FloatingPointError: a score is not finite, because the inner steps diverge.
        """
        was_training = learner.training
        learner.eval()
        try:
            with torch.no_grad():
                scores = torch.cat([_adapted_scores(learner, e, steps) for e in self._chunks()])
        finally:
            learner.train(was_training)
        if lost := int((~scores.isfinite()).sum()):
            taken = "" if steps is None else f" after {steps} inner steps"
            raise FloatingPointError(
                f"{lost} of {self.tasks} tasks have no finite score{taken}; fewer steps or a "
                "smaller inner_lr may help"
            )
        regression = self.episodes[self.stream].query_y.is_floating_point()
        mean, interval = mean_interval(scores)
        return Evaluation(
            "mse" if regression else "accuracy",
            mean,
            interval,
            self.tasks,
            transductive=isinstance(learner, EpisodeLearner) and learner.is_transductive,
        )

    def _chunks(self) -> Iterator[Episode]:
        size = self.episodes.tasks
        for begin in range(0, self.tasks, size):
            episode = self.episodes[self.stream + begin // size]
            yield Episode(*(tensor[: self.tasks - begin] for tensor in episode))


def evaluate_run(
    out: Path,
    *,
    tasks: int = 600,
    ways: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    steps: int | None = None,
    data: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> RunEvaluation:
    """Score a trained run on tasks of the evaluation split, and write ``eval.json`` to its folder.

    Args:
        out: folder of the run.
        tasks: number of tasks, at least 2.
        ways, shots, queries: sizes of a task; ``None``: as in training.
        steps: inner steps, if the learner takes any; ``None``: the run's ``eval_steps``.
        data: source of the tasks; ``None``: the evaluation split of the run's data.
        seed: seed of the tasks.
        device: device of the evaluation; ``None``: the device of the training.

    Raises:
        FileNotFoundError: the run, its checkpoint or the data are missing.
        ValueError: an argument does not fit the run or the data.
        FloatingPointError: the inner steps diverge.

    Example::

        evaluation = evaluate_run(Path("runs/glyphs"), tasks=1000)
        print(evaluation)
        # ProtoNet on glyphs, 5-way 1-shot, 1000 evaluation tasks: accuracy 95.13 ± 0.41 %
    """
    run = load_run(out, device)
    config = run.config
    data = data or config.data
    if (data == REGRESSION) != config.regression:
        raise ValueError(f"data: a run on {config.data} cannot be evaluated on {data}")
    name = NAMES[config.algorithm]
    compares = config.algorithm in METRIC_LEARNERS
    if not compares and ways not in (None, config.ways):
        raise ValueError(f"ways: this {name}'s head has {config.ways} classes, got {ways}")
    if compares and steps is not None:
        raise ValueError(f"steps: a {name} takes no inner steps, got {steps}")
    ways = config.ways if ways is None else ways
    shots = config.shots if shots is None else shots
    queries = config.queries if queries is None else queries
    steps = config.eval_steps if steps is None else steps
    least = shots + queries
    source = from_spec(data, "evaluation", config.protocol, min_images=least)
    evaluator = Evaluator(source, ways, shots, queries, tasks, seed, device=config.device)
    found = RunEvaluation(
        **asdict(evaluator(run.learner, steps)),
        title=config.title,
        data=data,
        ways=ways,
        shots=shots,
        queries=queries,
        steps=steps,
        seed=seed,
        iteration=run.iteration,
    )
    write_json(out / EVALUATION, asdict(found))
    return found


def mean_interval(scores: Tensor) -> tuple[float, float]:
    """Mean of n scores, and half its 95 % interval ``1.96 * std / sqrt(n)`` (std over n - 1).

    Example:
        >>> mean, interval = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> mean, round(interval, 4)
        (2.5, 1.2652)
    """
    scores = scores.double()
    return scores.mean().item(), 1.96 * scores.std().item() / math.sqrt(len(scores))


def query_scores(logits: Tensor, query_y: Tensor) -> Tensor:
    """Score of each task, ``[T]``: accuracy, or mean squared error if labels are floats."""
    if query_y.is_floating_point():
        return (logits - query_y).square().flatten(1).mean(1)
    return (logits.argmax(-1) == query_y).double().mean(1)


def _adapted_scores(learner: Learner, episode: Episode, steps: int | None) -> Tensor:
    adapted = learner.adapt_tasks(episode.support_x, episode.support_y, steps=steps)
    return query_scores(adapted(episode.query_x), episode.query_y)
