"""The learners: thin front ends over the engines, one algorithm a file."""

from __future__ import annotations

from fastmeta.engines.base import MetaGradient
from fastmeta.learners.base import AdaptedTasks, Learner
from fastmeta.learners.gradient.anil import ANIL, AdaptedHeads
from fastmeta.learners.gradient.fomaml import FOMAML
from fastmeta.learners.gradient.imaml import IMAML
from fastmeta.learners.gradient.maml import MAML
from fastmeta.learners.gradient.maml_plus_plus import MAMLPlusPlus
from fastmeta.learners.gradient.meta_curvature import MetaCurvature
from fastmeta.learners.gradient.meta_sgd import MetaSGD
from fastmeta.learners.gradient.reptile import Reptile
from fastmeta.learners.metric.matching_net import AdaptedMatchingNet, MatchingNet
from fastmeta.learners.metric.protonet import AdaptedProtoNet, ProtoNet
from fastmeta.learners.metric.relation_net import AdaptedRelationNet, RelationNet
from fastmeta.learners.metric.siamese_net import AdaptedSiameseNet, SiameseNet

__all__ = [
    "ANIL",
    "FOMAML",
    "IMAML",
    "MAML",
    "AdaptedHeads",
    "AdaptedMatchingNet",
    "AdaptedProtoNet",
    "AdaptedRelationNet",
    "AdaptedSiameseNet",
    "AdaptedTasks",
    "Learner",
    "MAMLPlusPlus",
    "MatchingNet",
    "MetaCurvature",
    "MetaGradient",
    "MetaSGD",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "SiameseNet",
]
