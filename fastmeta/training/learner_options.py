"""Options of each learner, and the default of every option that depends on learner or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastmeta.core.checks import check_choice

# Algorithms as titles and tables name them.
NAMES = {
    "protonet": "ProtoNet",
    "matching": "MatchingNet",
    "siamese": "SiameseNet",
    "relation": "RelationNet",
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "reptile": "Reptile",
    "metasgd": "Meta-SGD",
    "mamlpp": "MAML++",
    "metacurvature": "Meta-Curvature",
    "imaml": "iMAML",
}

ALGORITHMS = tuple(NAMES)

# Learners that compare embeddings: classifiers of any number of ways, without inner steps.
METRIC_LEARNERS = ("protonet", "matching", "siamese", "relation")

# Losses of the learners that have a choice.
LOSSES = {"siamese": ("bce", "contrastive"), "relation": ("mse", "cross_entropy")}

REGRESSION = "sinusoid"

OPTIMIZERS = {"adam": 1e-3, "sgd": 1.0}  # each with its default step size


class ValueOf(NamedTuple):
    """Default that equals the value of another option."""

    option: str

    def __str__(self) -> str:
        return f"--{self.option}"


def _inner_loop(steps: int, inner_lr: float, **own: Any) -> dict[str, Any]:
    return {"steps": steps, "eval_steps": ValueOf("steps"), "inner_lr": inner_lr, **own}


# Options that not all learners have, with their defaults on images.
LEARNER_OPTIONS: dict[str, dict[str, Any]] = {
    "protonet": {"train_ways": ValueOf("ways"), "metric": "sqeuclidean"},
    "matching": {"train_ways": 20, "metric": "cosine", "scale": 10.0, "context_steps": 0},
    "siamese": {"train_ways": 20, "loss": "bce", "margin": 1.0, "reduce": "max"},
    "relation": {
        "train_ways": ValueOf("ways"),
        "loss": "mse",
        "aggregate": "sum",
        "norm_statistics": "running",
    },
    "maml": _inner_loop(1, 0.4, first_order=False, learn_lr=False, adapt=None),
    "fomaml": _inner_loop(5, 0.1, learn_lr=False, adapt=None),
    "anil": _inner_loop(5, 0.1, first_order=False, learn_lr=False),
    "reptile": _inner_loop(5, 0.001, inner_batch=10) | {"eval_steps": 50},
    "metasgd": _inner_loop(1, 0.4, first_order=False, adapt=None),
    "mamlpp": _inner_loop(5, 0.1, multi_step_iterations=1000, first_order_iterations=0, adapt=None),
    "metacurvature": _inner_loop(1, 0.4, first_order=False, adapt=None),
    "imaml": _inner_loop(16, 0.1, regularization=2.0, cg_steps=5, cg_damping=1.0, adapt=None),
}

OF_SOME_LEARNERS = tuple(dict.fromkeys(name for own in LEARNER_OPTIONS.values() for name in own))

_ON_IMAGES = {"ways": 5, "shots": 1, "queries": 15, "meta_batch": 16, "hidden": 64, "pool": "max"}

# Of the sizes of an episode and the network, on images.
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "protonet": {"meta_batch": 4},
    "matching": {"meta_batch": 2, "queries": 5},
    "siamese": {"meta_batch": 2, "queries": 5},
    "relation": {"meta_batch": 2, "pool": None},  # its network has no choice of pooling
}

_ON_SINUSOIDS = {"ways": 1, "shots": 10, "queries": 10, "meta_batch": 25, "hidden": 40}


def defaults(algorithm: str, regression: bool) -> dict[str, Any]:
    """Defaults of a learner on images, or on sinusoids if ``regression``.

    Example:
        >>> defaults("reptile", regression=True)["inner_batch"]
        10
    """
    found = (_ON_SINUSOIDS if regression else _ON_IMAGES) | LEARNER_OPTIONS[algorithm]
    found |= _OWN_SIZES.get(algorithm, {})
    if regression and algorithm not in ("reptile", *METRIC_LEARNERS):
        found["inner_lr"] = 0.01
    return found | {"optimizer": "sgd" if algorithm == "reptile" else "adam"}


def resolved_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that ``options`` lead to: some follow the value of another option.

    Args:
        options: all options of a run; None stands for an option that was left out.

    Raises:
        ValueError: the optimizer is unknown.
    """
    algorithm = options["algorithm"]
    found = defaults(algorithm, options["data"] == REGRESSION)

    def value_of(name: str) -> Any:
        return found[name] if options[name] is None else options[name]

    optimizer = check_choice("optimizer", value_of("optimizer"), OPTIMIZERS)
    found["lr"] = OPTIMIZERS[optimizer]
    decays = algorithm == "mamlpp" or (algorithm, optimizer) == ("reptile", "sgd")
    if decays and options["lr_halve_every"] == 0:
        found["lr_cosine"] = options["iterations"]
    for name, value in found.items():
        if isinstance(value, ValueOf):
            found[name] = value_of(value.option)
    return found


def describe_default(name: str) -> str:
    """Default of an option in words; empty if it depends neither on the learner nor on the data.

    Example:
        >>> describe_default("steps")
        '1; 5 for fomaml, anil, reptile, mamlpp; 16 for imaml'
    """
    on_images: dict[Any, list[str]] = {}
    on_sinusoids: dict[Any, None] = {}
    for algorithm in ("maml", *ALGORITHMS):  # first MAML, whose default is said without a name
        value, other = (defaults(algorithm, regression).get(name) for regression in (False, True))
        if value is not None and value is not False:
            on_images.setdefault(value, []).append(algorithm)
        if algorithm not in METRIC_LEARNERS and other not in (None, value):
            on_sinusoids[other] = None
    if not on_images:
        return ""
    (usual, _), *others = on_images.items()
    words = [str(usual), *(f"{value} for {', '.join(names)}" for value, names in others)]
    return "; ".join([*words, *(f"{value} on {REGRESSION}" for value in on_sinusoids)])
