"""The ops: one function, one contract, three implementations (C++, CUDA, plain PyTorch)."""

from fastmeta.core.backend import backend_of, build_info, use_backend
from fastmeta.ops.activation import activation
from fastmeta.ops.inner_update import inner_update
from fastmeta.ops.linear_head import linear_head
from fastmeta.ops.linear_head_hvp import linear_head_hvp
from fastmeta.ops.mahalanobis import class_covariances, mahalanobis_distance
from fastmeta.ops.matching_logits import matching_logits
from fastmeta.ops.matching_loss import matching_loss
from fastmeta.ops.nearest import nearest
from fastmeta.ops.pair_pool import pair_pool
from fastmeta.ops.pair_scores import pair_scores
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototype_loss import prototype_loss
from fastmeta.ops.prototypes import prototypes
from fastmeta.ops.ridge_head import ridge_head
from fastmeta.ops.task_batch_norm import task_batch_norm
from fastmeta.ops.task_conv2d import task_conv2d
from fastmeta.ops.task_linear import task_linear

__all__ = [
    "activation",
    "backend_of",
    "build_info",
    "class_covariances",
    "inner_update",
    "linear_head",
    "linear_head_hvp",
    "mahalanobis_distance",
    "matching_logits",
    "matching_loss",
    "nearest",
    "pair_pool",
    "pair_scores",
    "pairwise_distance",
    "prototype_loss",
    "prototypes",
    "ridge_head",
    "task_batch_norm",
    "task_conv2d",
    "task_linear",
    "use_backend",
]
