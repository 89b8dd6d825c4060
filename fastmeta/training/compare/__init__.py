"""Comparison of learners, trained one after the other on the same tasks, or of existing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastmeta.data import from_spec
from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.compare.plan import SAME, learner_named_in_errors
from fastmeta.training.compare.report import (
    DIVERGED,
    PICTURE,
    RECORD,
    TABLE,
    Comparison,
    Entry,
    read_record,
)
from fastmeta.training.config import TrainConfig, check_same_run, read_options
from fastmeta.training.environment import cpu_threads
from fastmeta.training.evaluation import Evaluator, RunEvaluation, evaluate_run
from fastmeta.training.learner_options import NAMES
from fastmeta.training.loop import train
from fastmeta.training.metrics_log import read_metrics
from fastmeta.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    begin_folder,
    check_folder,
    load_run,
)

__all__ = ["compare", "compare_runs"]

_TASKS = 600  # of an evaluation

_NO_TIME = 1e-9  # minutes: TrainConfig wants a limit above 0

Report = Callable[[Entry], object]


def compare(
    configs: Sequence[TrainConfig],
    out: Path,
    *,
    tasks: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Comparison:
    """Train learners one after the other, score each, and write a table and a picture.

    The folder ``out`` gets ``comparison.json`` with all numbers, ``comparison.md`` with the table
    and the command of each run, and ``comparison.png``. They are replaced after each learner.
    Each run is trained by :func:`fastmeta.training.loop.train` and scored by
    :func:`fastmeta.training.evaluation.evaluate_run`. A signal that ends a training ends the
    comparison; a learner that diverges does not.

    Args:
        configs: options of the learners, each algorithm once, as
            :func:`fastmeta.training.compare.plan.plan` makes them. Data, protocol, ways and shots
            agree. The time limit holds for each learner.
        out: folder of the comparison.
        tasks: number of evaluation tasks, at least 2; ``None``: 600, or the number of the
            comparison to resume.
        resume: continue the comparison in ``out``. Finished learners are kept. A run that was
            interrupted continues bit for bit, and its time so far counts.
        overwrite: replace the comparison in ``out``, and its runs.
        report: called with each learner when it is done.

    Raises:
        FileNotFoundError: there is nothing to resume, or the data are missing.
        FileExistsError: a folder holds a comparison or a run, and neither ``resume`` nor
            ``overwrite`` is given.
        ValueError: options contradict each other, the data or the comparison to resume.
            All three are raised before anything is written.

    Example:
        >>> import tempfile
        >>> from fastmeta.training.compare.plan import plan
        >>> out = Path(tempfile.mkdtemp())
        >>> configs = plan(out, "sinusoid", ["maml", "fomaml"], hidden=8, iterations=3)
        >>> [entry.iteration for entry in compare(configs, out, tasks=10).entries]
        [3, 3]
    """
    _check_agreement("configs", configs)
    _check_unique("configs", (config.algorithm for config in configs))
    entries = [Entry(config, NAMES[config.algorithm]) for config in configs]
    _check_folders(configs, out, resume, overwrite)
    record = read_record(out) if resume else None
    if tasks is None:
        tasks = record.tasks if record else _TASKS
    _check_training(configs)
    _check_scoring(configs, tasks)
    if record:
        for index, config in enumerate(configs):
            if config.algorithm in record.learners:
                learner = record.learners[config.algorithm]
                entries[index] = _resumed(entries[index], learner, tasks)
    else:
        for name in (RECORD, TABLE, PICTURE):  # before the runs that they report on
            (out / name).unlink(missing_ok=True)
    for config in configs:
        if not (resume and (Path(config.out) / CONFIG).exists()):
            begin_folder(config, resume=False)
    comparison = Comparison(entries, tasks, trained=True)
    comparison.save(out)
    for index in range(len(entries)):
        entries[index] = entry = _trained(entries[index])
        if entry.stopped.startswith("SIG"):
            comparison.write(out)
            break
        comparison.save(out)  # killed while scoring, it need not train again
        with cpu_threads(entry.config.threads):
            _score(comparison, index, out, report)
    return comparison


def compare_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    tasks: int = _TASKS,
    queries: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Comparison:
    """Score existing runs, and write a table and a picture as :func:`compare` does.

    Args:
        runs: folders of the runs, which agree in data, protocol, ways and shots. Scoring leaves
            ``eval.json`` in each of them.
        out: folder of the comparison; it is made.
        tasks: number of evaluation tasks, at least 2.
        queries: query examples per class; ``None``: as in training.
        device: device of the evaluation; ``None``: the device of the training.
        overwrite: replace the comparison in ``out``.
        report: called with each learner when it is done.

    Raises:
        FileNotFoundError: a folder holds no run, or no checkpoint yet, or the data are missing.
        FileExistsError: ``out`` holds a comparison, and ``overwrite`` is not given.
        ValueError: the runs cannot be compared, or the data do not have such tasks.

    Example::

        comparison = compare_runs([Path("runs/maml"), Path("runs/fomaml")], Path("comparison"))
        print(comparison.table())
    """
    loaded = [load_run(run, device) for run in runs]
    configs = [run.config for run in loaded]
    _check_agreement("runs", configs)
    _check_unique("runs", (config.out for config in configs))
    _check_out(out, overwrite)
    _check_scoring(configs, tasks, queries)
    out.mkdir(parents=True, exist_ok=True)
    counts = Counter(config.algorithm for config in configs)
    comparison = Comparison([], tasks, trained=False)
    for run in loaded:
        several = f" ({run.config.out})" if counts[run.config.algorithm] > 1 else ""
        stopped = "finished" if run.iteration >= run.config.iterations else ""
        label = NAMES[run.config.algorithm] + several
        comparison.entries.append(Entry(run.config, label, run.iteration, run.seconds, stopped))
    for index in range(len(runs)):
        _score(comparison, index, out, report, queries)
    return comparison


def _check_agreement(name: str, configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ValueError(f"{name}: expected at least one, got none")
    first = configs[0]
    for option in SAME:
        for other in configs:
            if getattr(first, option) != getattr(other, option):
                raise ValueError(
                    f"{option}: expected the same in all runs, got {getattr(first, option)!r} in "
                    f"{first.out} and {getattr(other, option)!r} in {other.out}"
                )


def _check_unique(name: str, words: Iterable[str]) -> None:
    for word, count in Counter(words).items():
        if count > 1:
            raise ValueError(f"{name}: expected each once, got {word} {count} times")


def _check_out(out: Path, replaced: bool) -> None:
    check_folder(out, resume=False, overwrite=True)
    if (out / RECORD).exists() and not replaced:
        raise FileExistsError(
            f"{out} already holds a comparison: continue it (--resume), replace it "
            "(--overwrite), or choose another folder"
        )


def _check_folders(
    configs: Sequence[TrainConfig], out: Path, resume: bool, overwrite: bool
) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    _check_out(out, replaced=resume or overwrite)
    for config in configs:
        folder = Path(config.out)
        if not resume:
            check_folder(folder, resume, overwrite)
        elif (folder / CONFIG).exists():
            with learner_named_in_errors(config.algorithm):
                check_same_run(asdict(config), read_options(folder))


def _check_training(configs: Sequence[TrainConfig]) -> None:
    first, most = configs[0], max(config.shots + config.queries for config in configs)
    source = from_spec(first.data, "train", first.protocol, min_images=most)
    for config in configs:
        with learner_named_in_errors(config.algorithm):
            source.check(config.train_ways or config.ways, config.shots, config.queries)


def _check_scoring(configs: Sequence[TrainConfig], tasks: int, queries: int | None = None) -> None:
    first = configs[0]
    queried = {config.queries if queries is None else queries for config in configs}
    least = first.shots + max(queried)
    source = from_spec(first.data, "evaluation", first.protocol, min_images=least)
    for many in queried:
        Evaluator(source, first.ways, first.shots, many, tasks)


def _resumed(entry: Entry, record: dict[str, Any], tasks: int) -> Entry:
    """Entry with the progress of its run; stop and score are from the record while they hold."""
    config, folder = entry.config, Path(entry.config.out)
    if record["stopped"] == DIVERGED and (folder / CONFIG).exists():  # it would diverge again
        return Entry(
            config,
            entry.label,
            record["iterations"],
            record["seconds"],
            DIVERGED,
            error=record["error"],
        )
    if not (folder / CHECKPOINT).exists():
        return entry
    state = load_checkpoint(folder / CHECKPOINT)
    iteration, limit = state["iteration"], config.time_limit
    if iteration > config.iterations:
        before = f"{entry.label} has taken {iteration} already"
        raise ValueError(f"iterations: {before}, got {config.iterations}")
    stopped = "finished" if iteration == config.iterations else ""
    if not stopped and record["stopped"] == "time limit":
        stopped = "time limit" if limit and limit <= record["options"]["time_limit"] else ""
    found = record["evaluation"]
    holds = stopped and found and (found["iteration"], found["tasks"]) == (iteration, tasks)
    evaluation = RunEvaluation(**found) if holds else None
    return Entry(config, entry.label, iteration, state["seconds"], stopped, evaluation)


def _trained(entry: Entry) -> Entry:
    """Entry after its training; one whose training has ended is returned unchanged."""
    config = entry.config
    if entry.stopped:
        return entry
    rest = config
    if config.time_limit is not None:  # less the time of earlier sessions
        left = max(config.time_limit - entry.seconds / 60, _NO_TIME)
        rest = replace(config, time_limit=left)
    try:
        result = train(rest, resume=True)
    except FloatingPointError as error:
        metrics = read_metrics(Path(config.out) / METRICS) or [{"iteration": 0, "seconds": 0.0}]
        iteration, seconds = metrics[-1]["iteration"], metrics[-1]["seconds"]
        return Entry(config, entry.label, iteration, seconds, DIVERGED, error=str(error))
    begin_folder(config, resume=True)  # its config.json has the whole time limit
    return Entry(config, entry.label, result.iteration, result.seconds, result.stopped)


def _score(
    comparison: Comparison,
    index: int,
    out: Path,
    report: Report | None,
    queries: int | None = None,
) -> None:
    """Score one learner unless its score is known, write the files, and report it."""
    entry = comparison.entries[index]
    config = entry.config
    if not (entry.evaluation or entry.error):
        try:
            found = evaluate_run(
                Path(config.out), tasks=comparison.tasks, queries=queries, device=config.device
            )
            entry = replace(entry, evaluation=found)
        except FloatingPointError as error:
            entry = replace(entry, error=str(error))
    comparison.entries[index] = entry
    comparison.write(out)
    if report:
        report(entry)
