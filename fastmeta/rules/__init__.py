"""Inner rules: what an inner step makes of the parameters and the gradient.

``MAML(model, lr=..., rule=...)`` takes one; every rule has its value and its derivative, so
that meta-gradients pass through it, and its learned hyperparameters get theirs.

steps           SGD, Adam, PersistentAdam, RMSProp
wrapped around  ClipValue, ClipNorm, Proximal, MetaCurvature
"""

from fastmeta.rules.adaptive import Adam, PersistentAdam, RMSProp
from fastmeta.rules.base import Rule
from fastmeta.rules.clipping import ClipNorm, ClipValue
from fastmeta.rules.meta_curvature import MetaCurvature
from fastmeta.rules.proximal import Proximal
from fastmeta.rules.sgd import SGD

CarriedAdam = PersistentAdam  # its earlier name

__all__ = [
    "SGD",
    "Adam",
    "ClipNorm",
    "ClipValue",
    "MetaCurvature",
    "PersistentAdam",
    "Proximal",
    "RMSProp",
    "Rule",
]
