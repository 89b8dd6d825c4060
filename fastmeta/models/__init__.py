"""Standard networks of the few-shot literature."""

from fastmeta.core.inner_step import inner_step
from fastmeta.models.full_context import FullContext
from fastmeta.models.networks import MLP, Conv4, ResNet12
from fastmeta.models.per_step_norm import (
    PerStepBatchNorm1d,
    PerStepBatchNorm2d,
    with_per_step_norms,
)
from fastmeta.models.relation import RelationEncoder, RelationMLP, RelationModule

__all__ = [
    "MLP",
    "Conv4",
    "FullContext",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "RelationEncoder",
    "RelationMLP",
    "RelationModule",
    "ResNet12",
    "inner_step",
    "with_per_step_norms",
]
