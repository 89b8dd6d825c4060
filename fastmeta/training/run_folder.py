"""A training run on disk: its folder, and the learner that its options and checkpoint describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta import algorithms
from fastmeta.algorithms import ANIL, MAML, ProtoNet
from fastmeta.checkpoint import load_checkpoint, write_atomically, write_json
from fastmeta.config import OPTIONS, TrainConfig, read_options
from fastmeta.models import MLP, Conv4, with_per_step_norms

Learner = MAML | ANIL | ProtoNet

_INNER_LOOP: dict[str, type[MAML]] = {
    "maml": MAML,
    "fomaml": algorithms.FOMAML,
    "reptile": algorithms.Reptile,
    "metasgd": algorithms.MetaSGD,
    "mamlpp": algorithms.MAMLPlusPlus,
    "metacurvature": algorithms.MetaCurvature,
    "imaml": algorithms.IMAML,
}
_NOT_THE_LEARNERS = ("inner_lr", "eval_steps")

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

    A ``launch`` that has a name is noted, for ``begun_by``.
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


def begun_by(out: Path, launch: str) -> bool:
    """Whether that launch began the run in ``out``, or went on with it, before a restart."""
    if not launch or not (out / CONFIG).exists() or not (out / LAUNCH).exists():
        return False
    return (out / LAUNCH).read_text(encoding="utf-8") == launch


def build_learner(config: TrainConfig, input_shape: list[int]) -> Learner:
    """The untrained learner of a run, on ``config.device``; torch's generator draws its weights.

    Args:
        config: the run's options.
        input_shape: of one example, ``[channels, H, H]``, or ``[1]`` for regression.

    Raises:
        ValueError: images that are not square.
    """
    if config.algorithm == "protonet":
        encoder: Any = _conv4(config, input_shape, None)
        encoder.to(memory_format=torch.channels_last)  # what convolutions run fastest on
        return ProtoNet(encoder, metric=str(config.metric)).to(config.device)
    own = [name for name in OPTIONS[config.algorithm] if name not in _NOT_THE_LEARNERS]
    options: dict[str, Any] = {name: getattr(config, name) for name in own}
    options["lr"] = config.inner_lr
    options["loss"] = F.mse_loss if config.regression else F.cross_entropy
    if config.algorithm == "anil":
        parts = _body_and_head(config, input_shape)
        return ANIL(*parts, **options).to(config.device)
    make, network = _INNER_LOOP[config.algorithm], _network(config, input_shape)
    return make(network, **options).to(config.device)


def _network(config: TrainConfig, input_shape: list[int]) -> nn.Module:
    if config.regression:
        return MLP([*input_shape, config.hidden, config.hidden, 1])
    network = _conv4(config, input_shape, config.ways)
    if config.algorithm == "mamlpp" and config.steps is not None:
        return with_per_step_norms(network, config.steps)
    return network


def _body_and_head(config: TrainConfig, input_shape: list[int]) -> tuple[nn.Module, nn.Linear]:
    if config.regression:
        features = nn.Sequential(MLP([*input_shape, config.hidden, config.hidden]), nn.ReLU())
        return features, nn.Linear(config.hidden, 1)
    body = _conv4(config, input_shape, None)
    return body, nn.Linear(body.embedding_size, config.ways)


def _conv4(config: TrainConfig, input_shape: list[int], ways: int | None) -> Conv4:
    channels, height, width = input_shape
    if height != width:
        raise ValueError(f"data: expected square images, got {height} x {width} pixels")
    return Conv4(config.hidden, ways, channels, height, str(config.pool))


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
