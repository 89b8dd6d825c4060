"""The learners: thin front ends over the engines, one algorithm a file."""

from fastmeta.algorithms.maml import MAML, AdaptedTasks, MetaGradient
from fastmeta.algorithms.protonet import ProtoNet

__all__ = ["MAML", "AdaptedTasks", "MetaGradient", "ProtoNet"]
