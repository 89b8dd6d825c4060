"""Command ``train``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmeta import distributed
from fastmeta.cli.options import add_command, add_options, check_data
from fastmeta.training.config import TrainConfig, check_same_run, read_options
from fastmeta.training.learner_options import ALGORITHMS
from fastmeta.training.timing import duration

if TYPE_CHECKING:
    from fastmeta.training.loop import Result


def add_parser(commands: Any) -> None:
    """Add the parser of ``train``."""
    parser = add_command(commands, "train", run, "meta-train a learner")
    parser.add_argument("algorithm", choices=ALGORITHMS)
    add_options(parser, "run")


def run(given: dict[str, Any]) -> int:
    """Train with the options given, on top of the run's own if it is resumed."""
    from fastmeta.training.loop import train

    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    with distributed.process_group():
        if resume:
            begun = distributed.on_rank_zero(lambda: read_options(Path(given["out"])))
            check_same_run(given, begun)
            given = begun | given
        check_data(given)
        distributed.select_device(given.get("device", "cpu"))
        result = train(TrainConfig(**given), resume=resume, overwrite=overwrite)
        if distributed.rank() == 0:
            print(_summary(result))
    if result.stopped.startswith("SIG"):
        return 128 + signal.Signals[result.stopped]
    return 0


def _summary(result: Result) -> str:
    config, last = result.config, result.metrics[-100:]
    head = f"{config.title}: {result.iteration:,} of {config.iterations:,} iterations"
    head += f" in {duration(result.seconds)}"
    if result.stopped != "finished":
        head += f", stopped by {result.stopped.replace('time', 'the time')}"
    lines = [f"{head}."]
    if last:
        mean = sum(record[config.score] for record in last) / len(last)
        score = f"MSE {mean:.3f}" if config.regression else f"accuracy {100 * mean:.2f} %"
        lines.append(f"Training {score}, mean of the last {len(last)}; see {config.out}/curve.png.")
    if result.iteration < config.iterations:
        again = f"python -m fastmeta train {config.algorithm} --out {config.out} --resume"
        lines.append(f"Continue with: {again}")
    else:
        lines.append(f"Evaluate with: python -m fastmeta eval {config.out}")
    return "\n".join(lines)
