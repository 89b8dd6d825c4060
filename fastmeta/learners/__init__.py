"""The learners: thin front ends over the engines, one algorithm a file."""

from fastmeta.algorithms._results import AdaptedTasks, MetaGradient
from fastmeta.algorithms.anil import ANIL, AdaptedHeads
from fastmeta.algorithms.fomaml import FOMAML
from fastmeta.algorithms.imaml import IMAML
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.mamlpp import MAMLPlusPlus
from fastmeta.algorithms.metacurvature import MetaCurvature
from fastmeta.algorithms.metasgd import MetaSGD
from fastmeta.algorithms.protonet import ProtoNet
from fastmeta.algorithms.reptile import Reptile

__all__ = [
    "ANIL",
    "FOMAML",
    "IMAML",
    "MAML",
    "AdaptedHeads",
    "AdaptedTasks",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaGradient",
    "MetaSGD",
    "ProtoNet",
    "Reptile",
]
