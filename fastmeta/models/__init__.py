"""Standard networks of the few-shot literature."""

from fastmeta.core.inner_step import inner_step
from fastmeta.models.networks import MLP, Conv4, ResNet12
from fastmeta.models.per_step_norm import (
    PerStepBatchNorm1d,
    PerStepBatchNorm2d,
    with_per_step_norms,
)

__all__ = [
    "MLP",
    "Conv4",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "ResNet12",
    "inner_step",
    "with_per_step_norms",
]
