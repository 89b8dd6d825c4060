"""A training run on disk: its folder, and the learner that its options and checkpoint describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastmeta.training.checkpoint import load_checkpoint
from fastmeta.training.config import TrainConfig, read_options
from fastmeta.training.files import write_atomically, write_json
from fastmeta.training.learner_factory import Learner, build_learner

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.jsonl"

CURVE, EVALUATION, LAUNCH = "curve.png", "eval.json", "launch.txt"


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may begin in ``out`` (or go on there), before anything is loaded.

    Raises:
        FileNotFoundError: ``resume``, but there is no run.
        FileExistsError: there is one, and neither ``resume`` nor ``overwrite`` is given.
        NotADirectoryError: ``out`` is a file.
        ValueError: both are given.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: {out} is not a folder")
    if resume:
        read_options(out)
    elif not overwrite and ((out / CONFIG).exists() or (out / CHECKPOINT).exists()):
        raise FileExistsError(
            f"{out} already holds a run: go on with it (--resume), replace it (--overwrite), "
            "or choose another folder"
        )


def begin_folder(config: TrainConfig, resume: bool, launch: str = "") -> None:
    """Make the run's folder, clear it unless the run goes on there, and write its options.

    A ``launch`` that has a name is noted, for ``was_started_by``.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        # The options go first and come last: killed in between, the folder holds no run.
        for name in (CONFIG, CHECKPOINT, METRICS, CURVE, EVALUATION, LAUNCH):
            (out / name).unlink(missing_ok=True)
    if launch:
        write_atomically(out / LAUNCH, lambda file: file.write(launch.encode()))
    write_json(out / CONFIG, dataclasses.asdict(config))


def was_started_by(out: Path, launch: str) -> bool:
    """Whether that launch began the run in ``out``, or went on with it, before a restart."""
    if not launch or not (out / CONFIG).exists() or not (out / LAUNCH).exists():
        return False
    return (out / LAUNCH).read_text(encoding="utf-8") == launch


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run as its last checkpoint has it.

    Attributes:
        config: its options.
        learner: its learner.
        iteration: outer steps behind it.
        seconds: of training behind it.
    """

    config: TrainConfig
    learner: Learner
    iteration: int
    seconds: float


def load_run(out: Path, device: str | None = None) -> TrainedRun:
    """Read the run in the folder ``out``, wherever the folder was when it was trained.

    Args:
        out: the run's folder.
        device: where to put the learner; ``None``: where it was trained.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint of it yet.
        ValueError: a file of the run is damaged, or the device is not there.
    """
    options = read_options(out)
    path = out / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"the run in {out} has no checkpoint yet")
    config = TrainConfig(**{**options, "out": str(out), "device": device or options["device"]})
    state = load_checkpoint(path)
    learner = build_learner(config, state["input_shape"])
    learner.load_state_dict(state["learner"])
    return TrainedRun(config, learner, state["iteration"], state["seconds"])
