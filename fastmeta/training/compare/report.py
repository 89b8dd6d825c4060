"""Outcome of a comparison of learners: its record, its table and its picture."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

_READ = ("iterations", "seconds", "stopped", "error", "evaluation", "options")


@dataclass(frozen=True)
class Entry:
    """One learner of a comparison.

    Attributes:
        config: options of its run, whose folder is ``config.out``.
        label: its name in table and picture.
        iteration: outer steps taken.
        seconds: training time.
        stopped: reason why the training ended, as in :class:`fastmeta.training.loop.Result`, or
            ``"diverged"``; ``""`` if it has not ended.
        evaluation: its score; ``None`` if it has none yet.
        error: message if training or evaluation diverged, else ``""``.
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
        outcome = f"diverged ({self.error})" if self.error else "not finished"
        if self.evaluation is not None:
            outcome = Evaluation.__str__(self.evaluation)  # without task and run
        return f"{self.label}: {taken}, {outcome}"

    def record(self) -> dict[str, Any]:
        """The entry as written to JSON."""
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

    def row(self) -> tuple[str, ...]:
        """Cells of the table: learner, inner steps, iterations, training time, score."""
        found, config = self.evaluation, self.config
        score = (
            f"{found.digits}{found.note}" if found else "diverged" if self.error else "not finished"
        )
        steps = "-" if config.steps is None else f"{config.steps} / {config.eval_steps}"
        return self.label, steps, f"{self.iteration:,}", duration(self.seconds), score

    def curve(self) -> Curve:
        """Learning curve up to the checkpoint, with a note if its training tasks are unusual."""
        metrics = read_metrics(Path(self.config.out) / METRICS) if self.iteration else []
        ways, train_ways = self.config.ways, self.config.train_ways
        note = "training on the queries" if self.config.algorithm == "reptile" else ""
        note = note if train_ways in (None, ways) else f"{train_ways}-way training"
        return Curve(self.label, metrics[: self.iteration], note)


@dataclass(frozen=True)
class Comparison:
    """Learners and their scores on the same kind of tasks.

    Attributes:
        entries: the learners, in the order given.
        tasks: number of evaluation tasks.
        trained: whether the comparison trains the learners, instead of scoring existing runs.
    """

    entries: list[Entry]
    tasks: int
    trained: bool

    @property
    def stopped_by(self) -> signal.Signals | None:
        """Signal that ended the comparison early."""
        stops = [entry.stopped for entry in self.entries if entry.stopped.startswith("SIG")]
        return signal.Signals[stops[0]] if stops else None

    def save(self, out: Path) -> None:
        """Write ``comparison.json``, from which a killed comparison resumes."""
        learners = [entry.record() for entry in self.entries]
        record = {"trained": self.trained, "tasks": self.tasks, "learners": learners}
        write_json(out / RECORD, record)

    def write(self, out: Path) -> None:
        """Write ``comparison.json``, ``comparison.md`` and ``comparison.png``."""
        self.save(out)
        write_atomically(out / TABLE, lambda file: file.write(self._page().encode()))
        curves = [entry.curve() for entry in self.entries]
        scores = [entry.evaluation for entry in self.entries]
        draw_comparison(out / PICTURE, curves, scores, self.entries[0].config.score)

    def table(self) -> str:
        """Markdown table of the learners, best first, with notes below it.

        Example::

            print(comparison.table())
            # | Learner  | Inner steps | Iterations | Training time | Accuracy [%] |
            # | :------- | ----------: | ---------: | ------------: | -----------: |
            # | ProtoNet |           - |        500 |       1 min 3 s | 93.52 ± 0.49 |
        """
        score = "MSE" if self.entries[0].config.regression else "Accuracy [%]"
        head = ("Learner", "Inner steps", "Iterations", "Training time", score)
        rows = [head, *(entry.row() for entry in self._ranked())]
        notes = [f"{e.label} diverged: {e.error}." for e in self.entries if e.error]
        if found := [entry.evaluation for entry in self.entries if entry.evaluation]:
            queries = " or ".join(map(str, sorted({of.queries for of in found})))
            each = f"{queries} quer{'y' if queries == '1' else 'ies'}"
            each += "" if found[0].score == "mse" else " per class"
            mean = f"Mean over {self.tasks} evaluation tasks with {each}, and its 95 % interval."
            notes.insert(0, f"{mean} Inner steps: in training / in evaluation.")
        return "\n".join([*_markdown(rows), "", *notes])

    def _ranked(self) -> list[Entry]:
        """Entries with the best score first, and those without a score last, as given."""
        scored = [entry for entry in self.entries if entry.evaluation]
        highest_first = self.entries[0].config.score == "accuracy"
        scored.sort(key=lambda e: e.evaluation.mean if e.evaluation else 0, reverse=highest_first)
        return scored + [entry for entry in self.entries if not entry.evaluation]

    def _page(self) -> str:
        config = self.entries[0].config
        ways = "" if config.regression else f"{config.ways}-way "
        commands = [train_command(entry.config) for entry in self._ranked()]
        return "\n".join(
            [
                f"# Learners on {config.data.partition(':')[0]}, {ways}{config.shots}-shot\n",
                self.table(),
                f"\n![Learning curves and scores]({PICTURE})\n",
                "The runs, in the order of the table:\n",
                *("```sh", *commands, "```\n"),
            ]
        )


class Record(NamedTuple):
    """Contents of ``comparison.json``: the number of evaluation tasks, and learners by name."""

    tasks: int
    learners: dict[str, dict[str, Any]]


def read_record(out: Path) -> Record:
    """Read ``comparison.json`` of a comparison that trains its learners.

    Raises:
        FileNotFoundError: there is no comparison.
        ValueError: the file is damaged, or the comparison scores existing runs.
    """
    path = out / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{out} holds no comparison: there is no {RECORD}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        trained, tasks, entries = read["trained"], read["tasks"], read["learners"]
        learners = {entry["algorithm"]: {name: entry[name] for name in _READ} for entry in entries}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not trained:
        raise ValueError(f"resume: the comparison in {out} trains nothing, its runs exist")
    return Record(tasks, learners)


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a Markdown table in columns of equal width, numbers aligned to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    rule = [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)]
    return [
        f"| {' | '.join([cells[0].ljust(first), *map(str.rjust, cells[1:], others)])} |"
        for cells in (rows[0], rule, *rows[1:])
    ]
