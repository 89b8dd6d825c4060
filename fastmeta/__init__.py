"""fastmeta: meta-learning for PyTorch, batched over tasks, on compiled kernels.

ops         inner_update, prototypes, class_covariances, pairwise_distance, mahalanobis_distance,
            nearest, prototype_loss, matching_loss, matching_logits, pair_scores, pair_pool,
            task_conv2d, task_batch_norm, task_linear, linear_head, linear_head_hvp, ridge_head,
            hvp, ggnvp, activation
learners    MAML, FOMAML, ANIL, Reptile, MetaSGD, MAMLPlusPlus, MetaCurvature, IMAML,
            ProtoNet, MatchingNet, SiameseNet, RelationNet: `meta_loss` and `adapt_tasks`
rules       rules.SGD, rules.Adam, rules.RMSProp, rules.ClipNorm, rules.MetaCurvature, ...
heads       heads.SimpleShot, heads.Ridge, heads.TIM, ...: classifiers of stored features
data        data.Omniglot, data.Glyphs, data.Sinusoid, data.Episodes
processes   distributed.split_tasks, distributed.average_gradients, ...
networks    models.Conv4, models.ResNet12, models.MLP, models.PerStepBatchNorm2d
tasks       task_call, task_gradient: a module with the parameters of each task
encoders    lower: a network with shared weights on fastmeta's CPU kernels
backends    backend_of, use_backend, build_info; release_memory
"""

from fastmeta import data, distributed, heads, models, rules
from fastmeta.core.backend import backend_of, build_info, use_backend
from fastmeta.core.memory import release_memory
from fastmeta.core.version import VERSION
from fastmeta.engines.lower import lower
from fastmeta.engines.task_call import task_call
from fastmeta.engines.task_gradient import task_gradient
from fastmeta.learners.gradient.anil import ANIL
from fastmeta.learners.gradient.fomaml import FOMAML
from fastmeta.learners.gradient.imaml import IMAML
from fastmeta.learners.gradient.maml import MAML
from fastmeta.learners.gradient.maml_plus_plus import MAMLPlusPlus
from fastmeta.learners.gradient.meta_curvature import MetaCurvature
from fastmeta.learners.gradient.meta_sgd import MetaSGD
from fastmeta.learners.gradient.reptile import Reptile
from fastmeta.learners.linear_operator import as_linear_operator
from fastmeta.learners.metric.matching_net import MatchingNet
from fastmeta.learners.metric.protonet import ProtoNet
from fastmeta.learners.metric.relation_net import RelationNet
from fastmeta.learners.metric.siamese_net import SiameseNet
from fastmeta.ops import (
    activation,
    class_covariances,
    inner_update,
    linear_head,
    linear_head_hvp,
    mahalanobis_distance,
    matching_logits,
    matching_loss,
    nearest,
    pair_pool,
    pair_scores,
    pairwise_distance,
    prototype_loss,
    prototypes,
    ridge_head,
    task_batch_norm,
    task_conv2d,
    task_linear,
)
from fastmeta.ops.ggnvp import ggnvp
from fastmeta.ops.hvp import hvp

__version__ = VERSION

__all__ = [
    "ANIL",
    "FOMAML",
    "IMAML",
    "MAML",
    "MAMLPlusPlus",
    "MatchingNet",
    "MetaCurvature",
    "MetaSGD",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "SiameseNet",
    "activation",
    "as_linear_operator",
    "backend_of",
    "build_info",
    "class_covariances",
    "data",
    "distributed",
    "ggnvp",
    "heads",
    "hvp",
    "inner_update",
    "linear_head",
    "linear_head_hvp",
    "lower",
    "mahalanobis_distance",
    "matching_logits",
    "matching_loss",
    "models",
    "nearest",
    "pair_pool",
    "pair_scores",
    "pairwise_distance",
    "prototype_loss",
    "prototypes",
    "release_memory",
    "ridge_head",
    "rules",
    "task_batch_norm",
    "task_call",
    "task_conv2d",
    "task_gradient",
    "task_linear",
    "use_backend",
]
