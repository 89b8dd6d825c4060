"""What a comparison of learners came to: its record, its table and its picture."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmeta.training.command_line import train_command
from fastmeta.training.config import TrainConfig
from fastmeta.training.evaluation import Evaluation, RunEvaluation
from fastmeta.training.files import write_atomically, write_json
from fastmeta.training.metrics_log import read_metrics
from fastmeta.training.plots import Curve, draw_comparison
from fastmeta.training.run_folder import METRICS
from fastmeta.training.timing import duration

RECORD, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.png"

DIVERGED = "diverged"

_KEYS = {"label", "algorithm", "iterations", "seconds", "stopped", "error", "evaluation", "options"}


@dataclass(frozen=True)
class Entry:
    """One learner of a comparison.

    Attributes:
        config: the options of its run, whose folder is ``config.out``.
        label: its name in table and picture.
        iteration: outer steps taken.
        seconds: training time.
        stopped: why the training ended, as in :class:`fastmeta.training.loop.Result`;
            ``"diverged"``; ``""`` before the end, also of an earlier run that did not end.
        evaluation: its score; ``None`` as long as there is none.
        error: how it diverged, in training or in evaluation; ``""`` where it did not.
    """

    config: TrainConfig
    label: str
    iteration: int = 0
    seconds: float = 0.0
    stopped: str = ""
    evaluation: RunEvaluation | None = None
    error: str = ""

    def __str__(self) -> str:
        taken = f"{self.iteration:,} iterations in {duration(self.seconds)}"
        return f"{self.label}: {taken}, {self.outcome}"

    @property
    def outcome(self) -> str:
        """The score, or why there is none."""
        if self.evaluation is not None:
            return Evaluation.__str__(self.evaluation)
        return f"diverged ({self.error})" if self.error else "not finished"

    def record(self) -> dict[str, Any]:
        """The entry as JSON has it."""
        return {
            "label": self.label,
            "algorithm": self.config.algorithm,
            "iterations": self.iteration,
            "seconds": self.seconds,
            "seconds_per_iteration": self.seconds / self.iteration if self.iteration else None,
            "stopped": self.stopped,
            "error": self.error,
            "evaluation": self.evaluation and asdict(self.evaluation),
            "options": asdict(self.config),
            "command": train_command(self.config),
        }

    def curve(self) -> Curve:
        """The learning curve, up to the checkpoint."""
        metrics = read_metrics(Path(self.config.out) / METRICS) if self.iteration else []
        return Curve(self.label, metrics[: self.iteration], self._training())

    def _training(self) -> str:
        """What the training curve shows, where that is not what the others show."""
        ways, train_ways = self.config.ways, self.config.train_ways
        if train_ways not in (None, ways):
            return f"{train_ways}-way training"
        return "training on the queries" if self.config.algorithm == "reptile" else ""


@dataclass(frozen=True)
class Comparison:
    """Learners and how they scored on the same kind of tasks.

    Attributes:
        entries: the learners, as given.
        tasks: number of evaluation tasks.
        trained: whether the comparison trains them; else their runs were there before.
    """

    entries: list[Entry]
    tasks: int
    trained: bool

    @property
    def stopped_by(self) -> signal.Signals | None:
        """The signal that ended the comparison early."""
        stops = [entry.stopped for entry in self.entries if entry.stopped.startswith("SIG")]
        return signal.Signals[stops[0]] if stops else None

    def save(self, out: Path) -> None:
        """Write ``comparison.json`` into ``out``: from it, a killed comparison goes on."""
        learners = [entry.record() for entry in self.entries]
        record = {"trained": self.trained, "tasks": self.tasks, "learners": learners}
        write_json(out / RECORD, record)

    def write(self, out: Path) -> None:
        """Write ``comparison.json``, ``comparison.md`` and ``comparison.png`` into ``out``."""
        self.save(out)
        write_atomically(out / TABLE, lambda file: file.write(self._page().encode()))
        draw_comparison(
            out / PICTURE,
            [entry.curve() for entry in self.entries],
            [entry.evaluation for entry in self.entries],
            self.entries[0].config.score,
        )

    def table(self) -> str:
        """The learners in Markdown, best first, then those without a score; below, what it means.

        Example::

            print(comparison.table())
            # | Learner  | Inner steps | Iterations | Training time | Accuracy [%] |
            # | :------- | ----------: | ---------: | ------------: | -----------: |
            # | ProtoNet |           - |        500 |       1 min 3 s | 93.52 ± 0.49 |
        """
        regression = self.entries[0].config.regression
        score = "MSE" if regression else "Accuracy [%]"
        rows: list[tuple[str, ...]] = [
            ("Learner", "Inner steps", "Iterations", "Training time", score)
        ]
        rows += [_row(entry) for entry in self._ranked()]
        return "\n".join([*_aligned(rows), "", *self._notes()])

    def _ranked(self) -> list[Entry]:
        """Best first; those without a score last, as given."""
        sign = -1 if self.entries[0].config.score == "accuracy" else 1

        def place(entry: Entry) -> tuple[bool, float]:
            found = entry.evaluation
            return found is None, sign * found.mean if found else 0.0

        return sorted(self.entries, key=place)

    def _notes(self) -> list[str]:
        found = [entry.evaluation for entry in self.entries if entry.evaluation]
        notes = []
        if found:
            queries = sorted({of.queries for of in found})
            many = " or ".join(map(str, queries))
            each = f"{many} quer{'y' if queries == [1] else 'ies'}"
            each += "" if found[0].score == "mse" else " a class"
            notes.append(
                f"Mean over {self.tasks} evaluation tasks with {each}, and its 95 % interval. "
                "Inner steps: in training / in evaluation."
            )
        return notes + [f"{e.label} diverged: {e.error}." for e in self.entries if e.error]

    def _page(self) -> str:
        config = self.entries[0].config
        task = f"{config.ways}-way {config.shots}-shot"
        task = f"{config.shots}-shot" if config.regression else task
        commands = [train_command(entry.config) for entry in self._ranked()]
        return "\n".join(
            [
                f"# Learners on {config.data.partition(':')[0]}, {task}\n",
                self.table(),
                f"\n![Learning curves and scores]({PICTURE})\n",
                "The runs, in the order of the table:\n",
                *("```sh", *commands, "```\n"),
            ]
        )


def read_record(out: Path) -> dict[str, Any]:
    """The ``comparison.json`` of a comparison that trains its learners: ``tasks``, ``learners``.

    Raises:
        FileNotFoundError: there is no comparison.
        ValueError: the file is damaged, or the comparison is of runs that were there before.
    """
    path = out / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{out} holds no comparison: there is no {RECORD}")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        trained, _, learners = (record[name] for name in ("trained", "tasks", "learners"))
        whole = learners and all(set(learner) >= _KEYS for learner in learners)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not whole:
        raise ValueError(f"{path} is damaged: it does not hold the records of learners")
    if not trained:
        raise ValueError(f"resume: the comparison in {out} trains nothing, its runs exist")
    return record


def _row(entry: Entry) -> tuple[str, ...]:
    found, config = entry.evaluation, entry.config
    score = found.digits if found else "diverged" if entry.error else "not finished"
    steps = "-" if config.steps is None else f"{config.steps} / {config.eval_steps}"
    return entry.label, steps, f"{entry.iteration:,}", duration(entry.seconds), score


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a Markdown table, padded so that it is one to the eye too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    head, *body = map(line, rows)
    return [head, line(rule), *body]
