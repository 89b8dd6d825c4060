"""Construction of the learner that a config describes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta import learners as algorithms
from fastmeta.learners import ANIL, MAML, ProtoNet
from fastmeta.models import MLP, Conv4, with_per_step_norms
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import LEARNER_OPTIONS

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


def build_learner(config: TrainConfig, input_shape: list[int]) -> Learner:
    """Untrained learner of a run on ``config.device``, initialised by torch's default generator.

    Args:
        config: options of the run.
        input_shape: shape of one example, ``[channels, H, H]``, or ``[1]`` for regression.

    Raises:
        ValueError: the images are not square.
    """
    if config.algorithm == "protonet":
        encoder: Any = _conv4(config, input_shape, None)
        encoder.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
        return ProtoNet(encoder, metric=str(config.metric)).to(config.device)
    own = [name for name in LEARNER_OPTIONS[config.algorithm] if name not in _NOT_THE_LEARNERS]
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
