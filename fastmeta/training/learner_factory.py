"""Construction of the learner that a config describes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmeta import learners as algorithms
from fastmeta.learners import ANIL, MAML, MatchingNet, ProtoNet, RelationNet, SiameseNet
from fastmeta.learners.metric._episode_learner import EpisodeLearner
from fastmeta.models import (
    MLP,
    Conv4,
    FullContext,
    RelationEncoder,
    RelationModule,
    with_per_step_norms,
)
from fastmeta.training.config import TrainConfig
from fastmeta.training.learner_options import LEARNER_OPTIONS, METRIC_LEARNERS

Learner = MAML | ANIL | EpisodeLearner[Any]

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
    if config.algorithm in METRIC_LEARNERS:
        learner = _metric_learner(config, input_shape)
        encoder: Any = learner.encoder
        encoder.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
        return learner.to(config.device)
    own = [name for name in LEARNER_OPTIONS[config.algorithm] if name not in _NOT_THE_LEARNERS]
    options: dict[str, Any] = {name: getattr(config, name) for name in own}
    options["lr"] = config.inner_lr
    options["loss"] = F.mse_loss if config.regression else F.cross_entropy
    if config.algorithm == "anil":
        parts = _body_and_head(config, input_shape)
        return ANIL(*parts, **options).to(config.device)
    make, network = _INNER_LOOP[config.algorithm], _network(config, input_shape)
    return make(network, **options).to(config.device)


def _metric_learner(config: TrainConfig, input_shape: list[int]) -> EpisodeLearner[Any]:
    own: Any = {name: getattr(config, name) for name in LEARNER_OPTIONS[config.algorithm]}
    del own["train_ways"]
    if config.algorithm == "relation":
        return RelationNet(*_relation_networks(config, input_shape), **own)
    encoder = _conv4(config, input_shape, None)
    if config.algorithm == "siamese":
        return SiameseNet(encoder, encoder.embedding_size, **own)
    if config.algorithm == "protonet":
        return ProtoNet(encoder, **own)
    steps = own.pop("context_steps")
    context = FullContext(encoder.embedding_size, steps) if steps else None
    return MatchingNet(encoder, context=context, **own)


def _relation_networks(
    config: TrainConfig, input_shape: list[int]
) -> tuple[RelationEncoder, RelationModule]:
    channels, size = input_shape[0], _side(input_shape)
    maps = RelationEncoder.map_size(size)
    if maps < RelationModule.LEAST:
        raise ValueError(f"data: relation needs images of 22 x 22 pixels or more, got {size}")
    encoder = RelationEncoder(config.hidden, channels)
    return encoder, RelationModule(config.hidden, image_size=maps)


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
    return Conv4(config.hidden, ways, input_shape[0], _side(input_shape), str(config.pool))


def _side(input_shape: list[int]) -> int:
    """Height and width of images."""
    _, height, width = input_shape
    if height != width:
        raise ValueError(f"data: expected square images, got {height} x {width} pixels")
    return height
