"""The learners of ``learn2learn.algorithms`` that take gradient steps: MAML and Meta-SGD."""

from fastmeta.compat._missing import missing
from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.algorithms.maml import MAML, maml_update
from fastmeta.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]

_INSTEAD = {
    "GBML": "use fastmeta.MAML with a rule of fastmeta.rules",
    "LightningANIL": "use fastmeta.ANIL",
    "LightningMAML": "use fastmeta.MAML",
    "LightningPrototypicalNetworks": "use fastmeta.ProtoNet",
}


def __getattr__(name: str) -> object:
    raise missing(__name__, name, _INSTEAD)
