"""Inner rules: the update of an inner step, from parameters and gradient.

``MAML(model, lr=..., rule=...)`` takes one. Every rule has a derivative, so that meta-gradients
pass through it and reach its learned hyperparameters.

updates     SGD, Adam, PersistentAdam, RMSProp
wrappers    ClipValue, ClipNorm, Proximal, MetaCurvature
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
