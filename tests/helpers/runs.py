"""Small training runs, and the results by which two of them are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastmeta.data import ClassImages
from fastmeta.training.config import TrainConfig
from fastmeta.training.loop import Result, train

TINY = {"hidden": 4, "iterations": 4, "queries": 3, "meta_batch": 2}


def images(classes: int = 40, seed: int = 0, size: int = 16) -> ClassImages:
    """Make images of classes that are easy to tell apart: a pattern each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, 1, size, size, generator=generator) > 0.5
    noise = torch.randint(120, (classes, 8, 1, size, size), generator=generator)
    return ClassImages((120 * patterns + noise).to(torch.uint8))


def sinusoid(out: Path, **options: Any) -> TrainConfig:
    return TrainConfig("maml", "sinusoid", str(out), **{**TINY, **options})


def protonet(out: Path, **options: Any) -> TrainConfig:
    return TrainConfig("protonet", "images", str(out), **{**TINY, **options})


def maml(out: Path, **options: Any) -> TrainConfig:
    return TrainConfig("maml", "images", str(out), **{**TINY, **options})


def relative(algorithm: str, out: Path, **options: Any) -> TrainConfig:
    """Make the configuration of a relative of MAML on images, with few steps."""
    usual = {"steps": 2, "eval_steps": 2, **TINY}
    return TrainConfig(algorithm, "images", str(out), **{**usual, **options})


def run(config: TrainConfig, **how: Any) -> Result:
    return train(config, source=None if config.regression else images(), **how)


def weights(result: Result) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in result.learner.state_dict().values()]


def equal(first: Result, second: Result) -> bool:
    pairs = zip(weights(first), weights(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def without_seconds(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in m.items() if key != "seconds"} for m in metrics]
