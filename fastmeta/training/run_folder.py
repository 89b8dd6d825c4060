"""A training run on disk: its folder, its options and its checkpoint."""

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
    """Raise unless a run may start in ``out``, or resume there.

    Raises:
        FileNotFoundError: ``resume`` is given, but there is no run.
        FileExistsError: there is a run, and neither ``resume`` nor ``overwrite`` is given.
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
            f"{out} already holds a run: continue it (--resume), replace it (--overwrite), "
            "or choose another folder"
        )


def begin_folder(config: TrainConfig, resume: bool, launch: str = "") -> None:
    """Make the folder of a run, clear it unless the run resumes, and write the options.

    A ``launch`` with a name is stored for :func:`was_started_by`.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        # Options are deleted first and written last: killed in between, the folder holds no run.
        for name in (CONFIG, CHECKPOINT, METRICS, CURVE, EVALUATION, LAUNCH):
            (out / name).unlink(missing_ok=True)
    if launch:
        write_atomically(out / LAUNCH, lambda file: file.write(launch.encode()))
    write_json(out / CONFIG, dataclasses.asdict(config))


def was_started_by(out: Path, launch: str) -> bool:
    """Whether this launch already started or resumed the run in ``out``, before a restart."""
    if not launch or not (out / CONFIG).exists() or not (out / LAUNCH).exists():
        return False
    return (out / LAUNCH).read_text(encoding="utf-8") == launch


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run at its last checkpoint.

    Attributes:
        config: options of the run.
        learner: the trained learner.
        iteration: outer steps taken.
        seconds: training time.
    """

    config: TrainConfig
    learner: Learner
    iteration: int
    seconds: float


def load_run(out: Path, device: str | None = None) -> TrainedRun:
    """Read the run in the folder ``out``, which may have been moved since the training.

    Args:
        out: folder of the run.
        device: device of the learner; ``None``: the device of the training.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint yet.
        ValueError: a file of the run is damaged, or the machine lacks the device.
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
