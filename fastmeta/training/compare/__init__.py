"""Comparing learners: several are meta-trained on the same tasks, or were, and all are scored."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fastmeta.data import from_spec
from fastmeta.training.compare.plan import SAME, with_learner_name
from fastmeta.training.compare.report import (
    DIVERGED,
    PICTURE,
    RECORD,
    TABLE,
    Comparison,
    Entry,
    read_record,
)
from fastmeta.training.config import NAMES, TrainConfig, check_same_run, read_options
from fastmeta.training.environment import cpu_threads
from fastmeta.training.evaluation import Evaluator, RunEvaluation, evaluate_run
from fastmeta.training.loop import train
from fastmeta.training.metrics_log import read_metrics
from fastmeta.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    TrainedRun,
    begin_folder,
    check_folder,
    load_run,
)

__all__ = ["compare", "compare_runs"]

_TASKS = 600  # of an evaluation

_NO_TIME = 1e-9  # minutes: a limit is above 0

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
    """Meta-train learners one after the other, score each, and write a table and a picture.

    The folder ``out`` gets ``comparison.json`` with all numbers, ``comparison.md`` with the table
    and the command of each run, and ``comparison.png``, written anew, atomically, after each
    learner. Each run comes from :func:`fastmeta.training.loop.train` and is scored by
    :func:`fastmeta.training.evaluation.evaluate_run`. A signal that ends a training ends the
    comparison; a learner that diverges does not.

    Args:
        configs: the options of learners, each algorithm once, as
            :func:`fastmeta.training.compare.plan.plan` makes them; the same data, protocol, ways
            and shots. The time limit is for each learner.
        out: folder of the comparison.
        tasks: number of evaluation tasks, at least 2; ``None``: 600, or as the comparison to
            resume was begun with.
        resume: go on with the comparison in ``out``: finished learners stay as they are, the time
            that a begun one was trained for counts, and its run goes on bit for bit.
        overwrite: replace the comparison in ``out``, and the runs.
        report: called with every learner that is done.

    Raises:
        FileNotFoundError: there is nothing to resume, or the data are missing.
        FileExistsError: a folder holds a comparison or a run, and neither ``resume`` nor
            ``overwrite`` is given.
        ValueError: options that contradict each other, the data or what is to be resumed. As the
            two above, before anything is written.

    Example:
        >>> import tempfile
        >>> from fastmeta.training.compare.plan import plan
        >>> out = Path(tempfile.mkdtemp())
        >>> configs = plan(out, "sinusoid", ["maml", "fomaml"], hidden=8, iterations=3)
        >>> [entry.iteration for entry in compare(configs, out, tasks=10).entries]
        [3, 3]
    """
    _check_agreement("configs", configs)
    if twice := _twice(config.algorithm for config in configs):
        raise ValueError(f"configs: {twice} stands there more than once")
    entries = [Entry(config, NAMES[config.algorithm]) for config in configs]
    _check_folders(entries, out, resume, overwrite)
    begun: dict[str, Any] = read_record(out) if resume else {"tasks": _TASKS, "learners": []}
    tasks = begun["tasks"] if tasks is None else tasks
    _check_tasks(entries, tasks)
    if resume:
        records = {record["algorithm"]: record for record in begun["learners"]}
        entries = [_restored(entry, records, tasks) for entry in entries]
    else:
        for name in (RECORD, TABLE, PICTURE):  # before the runs that they tell of
            (out / name).unlink(missing_ok=True)
    for entry in entries:
        if not (resume and (Path(entry.config.out) / CONFIG).exists()):
            begin_folder(entry.config, resume=False)
    comparison = Comparison(entries, tasks, trained=True)
    comparison.save(out)
    for index in range(len(entries)):
        entries[index] = entry = _trained(entries[index])
        if entry.stopped.startswith("SIG"):
            comparison.write(out)
            break
        comparison.save(out)
        with cpu_threads(entry.config.threads):
            entries[index] = _scored(entry, tasks, device=entry.config.device)
        comparison.write(out)
        if report:
            report(entries[index])
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
    """Score runs that exist, and write a table and a picture as :func:`compare` does.

    Args:
        runs: the runs' folders; their data, protocol, ways and shots are the same. Scoring a run
            leaves ``eval.json`` in its folder.
        out: folder of the comparison; it is made.
        tasks: number of evaluation tasks, at least 2.
        queries: queries a class; ``None``: as each run was trained for.
        device: where to compute; ``None``: where each run was trained.
        overwrite: replace the comparison in ``out``.
        report: called with every learner that is done.

    Raises:
        FileNotFoundError: a folder holds no run, or no checkpoint of it yet, or the data are
            missing.
        FileExistsError: ``out`` holds a comparison, and ``overwrite`` is not given.
        ValueError: runs that cannot be compared, or tasks that the data do not have.

    Example::

        comparison = compare_runs([Path("runs/maml"), Path("runs/fomaml")], Path("comparison"))
        print(comparison.table())
    """
    loaded = [load_run(run, device) for run in runs]
    configs = [run.config for run in loaded]
    _check_agreement("runs", configs)
    if twice := _twice(config.out for config in configs):
        raise ValueError(f"runs: {twice} stands there more than once")
    entries = [
        Entry(run.config, label, run.iteration, run.seconds, _ending(run))
        for run, label in zip(loaded, _labels(configs), strict=True)
    ]
    _check_out(out, overwrite)
    _check_scoring(entries, tasks, queries)
    out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(entries, tasks, trained=False)
    for index, entry in enumerate(entries):
        entries[index] = _scored(entry, tasks, queries=queries, device=device)
        comparison.write(out)
        if report:
            report(entries[index])
    return comparison


def _twice(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _labels(configs: Sequence[TrainConfig]) -> list[str]:
    """Names of the algorithms, with the folder where there are several of one."""
    counts = Counter(config.algorithm for config in configs)
    names = [(NAMES[config.algorithm], config.out, counts[config.algorithm]) for config in configs]
    return [f"{name} ({out})" if count > 1 else name for name, out, count in names]


def _check_agreement(name: str, configs: Sequence[TrainConfig]) -> None:
    if not configs:
        raise ValueError(f"{name}: expected at least one, got none")
    first = configs[0]
    for other, option in product(configs[1:], SAME):
        ours, theirs = getattr(first, option), getattr(other, option)
        if ours != theirs:
            raise ValueError(
                f"{option}: runs of a comparison have the same, {first.out} has {ours!r}, "
                f"{other.out} has {theirs!r}"
            )


def _check_out(out: Path, replaced: bool) -> None:
    check_folder(out, resume=False, overwrite=True)
    if (out / RECORD).exists() and not replaced:
        raise FileExistsError(
            f"{out} already holds a comparison: go on with it (--resume), replace it "
            "(--overwrite), or choose another folder"
        )


def _check_folders(entries: Sequence[Entry], out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    _check_out(out, replaced=resume or overwrite)
    for entry in entries:
        folder = Path(entry.config.out)
        if not resume:
            check_folder(folder, resume, overwrite)
        elif (folder / CONFIG).exists():
            with with_learner_name(entry.config.algorithm):
                check_same_run(dataclasses.asdict(entry.config), read_options(folder))


def _check_tasks(entries: Sequence[Entry], tasks: int) -> None:
    config = entries[0].config
    training = from_spec(config.data, "train", config.protocol)
    for entry in entries:
        config = entry.config
        with with_learner_name(config.algorithm):
            training.check(config.train_ways or config.ways, config.shots, config.queries)
    _check_scoring(entries, tasks)


def _check_scoring(entries: Sequence[Entry], tasks: int, queries: int | None = None) -> None:
    config = entries[0].config
    source = from_spec(config.data, "evaluation", config.protocol)
    for many in {entry.config.queries if queries is None else queries for entry in entries}:
        Evaluator(source, config.ways, config.shots, many, tasks)


def _restored(entry: Entry, records: Mapping[str, dict[str, Any]], tasks: int) -> Entry:
    """The entry as far as its run and its record have come."""
    config, record = entry.config, records.get(entry.config.algorithm)
    out = Path(config.out)
    if record is None or not (out / CONFIG).exists():
        return entry
    if record["stopped"] == DIVERGED:  # it would again
        return dataclasses.replace(
            entry,
            **{"iteration": record["iterations"], "seconds": record["seconds"]},
            **{"stopped": DIVERGED, "error": record["error"]},
        )
    if not (out / CHECKPOINT).exists():
        return entry
    run = load_run(out, config.device)
    if run.iteration > config.iterations:
        taken = f"{entry.label} has taken {run.iteration} already"
        raise ValueError(f"iterations: {taken}, got {config.iterations}")
    stopped = "finished" if run.iteration == config.iterations else ""
    if not stopped and record["stopped"] == "time limit" and not _longer(config, record):
        stopped = "time limit"
    found = record["evaluation"]
    kept = stopped and found and (found["iteration"], found["tasks"]) == (run.iteration, tasks)
    return dataclasses.replace(
        entry,
        iteration=run.iteration,
        seconds=run.seconds,
        stopped=stopped,
        evaluation=RunEvaluation(**found) if kept else None,
    )


def _longer(config: TrainConfig, record: dict[str, Any]) -> bool:
    """Whether the time limit is above the one that ended the training."""
    return config.time_limit is None or config.time_limit > record["options"]["time_limit"]


def _ending(run: TrainedRun) -> str:
    return "finished" if run.iteration >= run.config.iterations else ""


def _trained(entry: Entry) -> Entry:
    if entry.stopped:
        return entry
    config = entry.config
    try:
        result = train(_rest(entry), resume=True)
    except FloatingPointError as error:
        last = (read_metrics(Path(config.out) / METRICS) or [{"iteration": 0, "seconds": 0.0}])[-1]
        taken = {name: last[name] for name in ("iteration", "seconds")}
        return dataclasses.replace(entry, **taken, stopped=DIVERGED, error=str(error))
    begin_folder(config, resume=True)  # with the whole time limit
    taken = {name: getattr(result, name) for name in ("iteration", "seconds", "stopped")}
    return dataclasses.replace(entry, **taken)


def _rest(entry: Entry) -> TrainConfig:
    """The options of what is left to train: the time limit is that of all sessions together."""
    limit = entry.config.time_limit
    if limit is None:
        return entry.config
    left = max(limit - entry.seconds / 60, _NO_TIME)
    return dataclasses.replace(entry.config, time_limit=left)


def _scored(entry: Entry, tasks: int, **how: Any) -> Entry:
    if entry.evaluation or entry.error:
        return entry
    try:
        found = evaluate_run(Path(entry.config.out), tasks=tasks, **how)
    except FloatingPointError as error:
        return dataclasses.replace(entry, error=str(error))
    return dataclasses.replace(entry, evaluation=found)
