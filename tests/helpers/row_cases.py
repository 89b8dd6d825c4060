"""Cases of the ops of rows: means, distances, losses and scores, see ``cases``."""

from __future__ import annotations

from typing import Any

import torch

import fastmeta as fm
from tests.helpers.case import METRICS, Arguments, Case, CaseFactory, unbatched, with_absent


def prototypes_case(
    name: str, t: int, s: int, n: int, d: int, missing: bool = False, absent: bool = False
) -> Case:
    def build(make: CaseFactory) -> Arguments:
        labels = make.labels(n - 1 if missing else n, t, s)
        return (make.randn(t, s, d), with_absent(labels) if absent else labels, n), {}

    return Case("prototypes", name, build, small=t * s * d <= 60)


def distance_case(metric: str, t: int, q: int, n: int, d: int) -> Case:
    def build(make: CaseFactory) -> Arguments:
        return (make.randn(t, q, d), make.randn(t, n, d)), {"metric": metric}

    name = f"{metric}-{t}x{q}x{n}x{d}"
    return Case("pairwise_distance", name, build, small=t * (q + n) * d <= 60)


def nearest_distances(*args: Any, **options: Any) -> torch.Tensor:
    """Call `fm.nearest` and return the distances, which have derivatives."""
    return fm.nearest(*args, **options)[0]


def nearest_case(metric: str, t: int, q: int, n: int, d: int, k: int, absent: bool = False) -> Case:
    def build(make: CaseFactory) -> Arguments:
        rows = make.randn(t, q, d), make.randn(t, n, d)
        if not absent:
            return (*rows, k, metric), {}
        present = make.labels(3, t, n) > 0
        present[:, :k] = True  # an infinite distance has no derivative
        return (*rows, k, metric, present), {}

    name = f"{metric}-{t}x{q}x{n}x{d}-{k}{'-absent' if absent else ''}"
    return Case("nearest", name, build, small=t * (q + n) * d <= 60, call=nearest_distances)


def loss_case(
    metric: str,
    reduction: str,
    t: int,
    q: int,
    n: int,
    d: int,
    scale: float = 1.0,
    absent: bool = False,
) -> Case:
    def build(make: CaseFactory) -> Arguments:
        query, labels, prototypes = make.randn(t, q, d), make.labels(n, t, q), make.randn(t, n, d)
        labels = with_absent(labels) if absent else labels
        options = {"metric": metric, "reduction": reduction, "scale": scale}
        return (query, labels, prototypes), options

    name = f"{metric}-{reduction}-{t}x{q}x{n}x{d}{'-absent' if absent else ''}"
    return Case("prototype_loss", name, build, small=t * (q + n) * d <= 60)


def support_labels(make: CaseFactory, classes: int, t: int, s: int, absent: bool) -> torch.Tensor:
    """Labels [t, s] in no order, with every class in every task; every third is absent if any."""
    labels = torch.full((t, s), -1)
    present = [i for i in range(s) if not absent or i % 3 != 1]
    each = torch.arange(len(present)).remainder(classes)
    for row in labels:
        row[present] = each[torch.randperm(len(present), generator=make.generator)]
    return labels.to(make.device)


def matching_case(
    metric: str,
    reduction: str,
    sizes: tuple[int, int, int, int],
    classes: int,
    scale: float = 1.0,
    absent: bool = False,
    exclude_self: bool = False,
) -> Case:
    """Make a case of T, Q, S, D in which each query has a support of its class."""
    t, q, s, d = sizes

    def build(make: CaseFactory) -> Arguments:
        of_support = support_labels(make, classes, t, s, absent)
        of_query = of_support if exclude_self else make.labels(classes, t, q)
        of_query = with_absent(of_query) if absent else of_query
        args = (make.randn(t, q, d), of_query, make.randn(t, s, d), of_support)
        options = {"metric": metric, "reduction": reduction, "scale": scale}
        return args, {**options, "exclude_self": exclude_self}

    more = "-absent" * absent + "-exclude_self" * exclude_self
    name = f"{metric}-{reduction}-{'x'.join(map(str, sizes))}-{classes}_classes{more}"
    return Case("matching_loss", name, build, small=t * (q + s) * d <= 60)


def matching_logits_case(
    metric: str, sizes: tuple[int, int, int, int], classes: int, absent: bool = False
) -> Case:
    t, q, s, d = sizes

    def build(make: CaseFactory) -> Arguments:
        labels = support_labels(make, classes, t, s, absent)
        return (make.randn(t, q, d), make.randn(t, s, d), labels, classes), {
            "metric": metric,
            "scale": 0.7,
        }

    name = f"{metric}-{'x'.join(map(str, sizes))}-{classes}_classes{'-absent' if absent else ''}"
    return Case("matching_logits", name, build, small=t * (q + s) * d <= 60)


def scores_case(
    activation: str,
    t: int,
    q: int,
    n: int,
    h: int,
    shared: bool = True,
    bias: bool = True,
) -> Case:
    """Make a pair_scores case whose weights all tasks share, or each has its own."""
    tasks = () if shared else (t,)

    def build(make: CaseFactory) -> Arguments:
        rows = make.randn(t, q, h), make.randn(t, n, h), make.randn(*tasks, h) / h**0.5
        return (*rows, *([make.randn(*tasks)] if bias else [])), {"activation": activation}

    ways = ("" if shared else "-weights_of_tasks") + ("" if bias else "-no_bias")
    name = f"{activation}-{t}x{q}x{n}x{h}{ways}"
    return Case("pair_scores", name, build, small=t * (q + n) * h <= 60)


PROTOTYPES = [
    prototypes_case("2x5x3x4", 2, 5, 3, 4),
    prototypes_case("one", 1, 1, 1, 1),
    prototypes_case("missing_class", 2, 4, 5, 3, missing=True),
    prototypes_case("absent", 2, 5, 3, 4, absent=True),
    prototypes_case("absent-slices", 3, 40, 7, 257, absent=True),
    unbatched(prototypes_case("2x5x3x4", 2, 5, 3, 4)),
    prototypes_case("slices", 3, 40, 7, 257),
    prototypes_case("proto_small", 2, 300, 60, 64),
]


PAIRWISE_DISTANCE = [
    *(distance_case(metric, 2, 4, 3, 2) for metric in METRICS),
    *(distance_case(metric, 1, 1, 1, 1) for metric in METRICS),
    *(distance_case(metric, 2, 7, 65, 17) for metric in METRICS),
    *(distance_case(metric, 1, 130, 129, 65) for metric in METRICS),
    distance_case("sqeuclidean", 3, 600, 31, 5),
    unbatched(distance_case("euclidean", 2, 4, 3, 2)),
]


NEAREST = [
    *(nearest_case(metric, 2, 4, 3, 2, k) for metric in METRICS for k in (1, 2)),
    nearest_case("euclidean", 2, 3, 4, 3, 2, absent=True),
    *(nearest_case(metric, 2, 97, 131, 17, 1) for metric in METRICS),
    *(nearest_case(metric, 1, 130, 129, 65, 5) for metric in METRICS),
    *(nearest_case(metric, 2, 40, 200, 9, 3, absent=True) for metric in METRICS),
    nearest_case("sqeuclidean", 1, 600, 140, 33, 40),
    unbatched(nearest_case("cosine", 2, 4, 3, 2, 2)),
]


PROTOTYPE_LOSS = [
    *(loss_case(metric, "mean", 2, 4, 3, 2) for metric in METRICS),
    *(loss_case("sqeuclidean", reduction, 2, 4, 3, 2, scale=0.7) for reduction in ("sum", "none")),
    loss_case("euclidean", "none", 2, 4, 3, 2, scale=2.0),
    loss_case("sqeuclidean", "mean", 2, 3, 1, 1),
    *(loss_case(metric, "mean", 2, 7, 65, 17, scale=0.5) for metric in METRICS),
    *(loss_case(metric, "none", 1, 130, 129, 65, scale=0.1) for metric in METRICS),
    loss_case("sqeuclidean", "sum", 2, 600, 31, 5),
    *(loss_case(metric, "mean", 2, 4, 3, 2, absent=True) for metric in METRICS),
    loss_case("euclidean", "none", 2, 4, 3, 2, absent=True),
    *(loss_case(metric, "mean", 2, 130, 65, 17, scale=0.5, absent=True) for metric in METRICS),
    loss_case("sqeuclidean", "sum", 2, 600, 31, 5, absent=True),
    unbatched(loss_case("sqeuclidean", "none", 2, 4, 3, 2)),
    unbatched(loss_case("cosine", "mean", 2, 4, 3, 2)),
]


MATCHING_LOSS = [
    *(matching_case(metric, "mean", (2, 4, 5, 2), 3) for metric in METRICS),
    *(matching_case("cosine", reduction, (2, 4, 5, 2), 2) for reduction in ("sum", "none")),
    matching_case("sqeuclidean", "mean", (2, 3, 1, 1), 1),
    matching_case("sqeuclidean", "none", (2, 5, 5, 2), 2, exclude_self=True),
    matching_case("cosine", "mean", (1, 8, 8, 2), 2, absent=True, exclude_self=True),
    *(matching_case(metric, "mean", (2, 3, 6, 2), 2, absent=True) for metric in METRICS),
    *(matching_case(metric, "mean", (2, 7, 65, 17), 9, scale=0.5) for metric in METRICS),
    *(matching_case(metric, "none", (1, 130, 129, 65), 5, scale=0.1) for metric in METRICS),
    matching_case("euclidean", "sum", (2, 70, 70, 33), 7, exclude_self=True),
    matching_case("cosine", "mean", (2, 130, 66, 17), 11, absent=True),
    matching_case("sqeuclidean", "mean", (2, 600, 31, 5), 5, scale=0.5, absent=True),
    matching_case("cosine", "mean", (3, 30, 25, 64), 5, scale=10.0),
    unbatched(matching_case("sqeuclidean", "none", (2, 4, 5, 2), 3)),
    unbatched(matching_case("cosine", "mean", (2, 4, 5, 2), 3)),
]


MATCHING_LOGITS = [
    *(matching_logits_case(metric, (2, 3, 5, 2), 3) for metric in METRICS),
    matching_logits_case("cosine", (2, 3, 6, 2), 2, absent=True),
    *(matching_logits_case(metric, (2, 7, 65, 17), 9) for metric in METRICS),
    matching_logits_case("sqeuclidean", (2, 130, 66, 17), 11, absent=True),
    unbatched(matching_logits_case("euclidean", (2, 3, 5, 2), 3)),
]


PAIR_ACTIVATIONS = ("relu", "tanh", "silu", "abs")


PAIR_SCORES = [
    *(scores_case(activation, 2, 4, 3, 2) for activation in PAIR_ACTIVATIONS),
    *(scores_case(activation, 1, 3, 2, 4, bias=False) for activation in PAIR_ACTIVATIONS),
    *(scores_case(activation, 2, 3, 2, 3, shared=False) for activation in PAIR_ACTIVATIONS),
    *(scores_case(activation, 2, 7, 65, 17) for activation in PAIR_ACTIVATIONS),
    *(scores_case(activation, 1, 130, 33, 65, shared=False) for activation in PAIR_ACTIVATIONS),
    scores_case("relu", 3, 600, 7, 33, bias=False),
    scores_case("abs", 1, 1, 1, 1),
    unbatched(scores_case("relu", 1, 4, 3, 5, shared=False)),
]
