"""learn2learn's gradient-based learners and module utilities, under learn2learn's names.

    import fastmeta.compat.learn2learn as l2l   # was: import learn2learn as l2l

algorithms  MAML, MetaSGD, maml_update, meta_sgd_update, BaseLearner
utils       clone_module, update_module, detach_module, clone_parameters, accuracy

The documentation lists the differences from learn2learn 0.2.0, see "Port a script".
"""

from fastmeta.compat._missing import missing
from fastmeta.compat.learn2learn import algorithms, utils
from fastmeta.compat.learn2learn.utils import (
    accuracy,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    update_module,
)

__all__ = [
    "accuracy",
    "algorithms",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_module",
    "update_module",
    "utils",
]

_INSTEAD = {
    "data": "use fastmeta.data for episodes, or learn2learn's own beside this module",
    "magic_box": "write torch.exp(x - x.detach())",
    "nn": "use fastmeta.models and fastmeta.ProtoNet, or learn2learn's own beside this module",
    "optim": "use fastmeta.rules with fastmeta.MAML, or learn2learn's own beside this module",
    "vision": "use fastmeta.data and fastmeta.models, or learn2learn's own beside this module",
}


def __getattr__(name: str) -> object:
    raise missing(__name__, name, _INSTEAD)
