"""fastmeta: meta-learning for PyTorch, batched over tasks, on compiled kernels.

ops         inner_update, prototypes, pairwise_distance, prototype_loss, task_conv2d,
            task_linear, linear_head, linear_head_hvp, hvp
learners    MAML, ProtoNet: `meta_loss` and `adapt_tasks`
data        data.Omniglot, data.Glyphs, data.Sinusoid, data.Episodes
networks    models.Conv4, models.ResNet12, models.MLP, models.PerStepBatchNorm2d
backends    backend_of, use_backend, build_info
"""

from fastmeta import data, models
from fastmeta._native import backend_of, build_info, use_backend
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.protonet import ProtoNet
from fastmeta.functional import hvp
from fastmeta.ops import (
    inner_update,
    linear_head,
    linear_head_hvp,
    pairwise_distance,
    prototype_loss,
    prototypes,
    task_conv2d,
    task_linear,
)

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "ProtoNet",
    "backend_of",
    "build_info",
    "data",
    "hvp",
    "inner_update",
    "linear_head",
    "linear_head_hvp",
    "models",
    "pairwise_distance",
    "prototype_loss",
    "prototypes",
    "task_conv2d",
    "task_linear",
    "use_backend",
]
