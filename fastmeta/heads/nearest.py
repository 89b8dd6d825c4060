"""Heads that choose the nearest class mean."""

from __future__ import annotations

import math

from torch import Tensor

from fastmeta.core.checks import check_choice, is_number
from fastmeta.heads.base import Head, Tasks
from fastmeta.ops._checks import METRICS
from fastmeta.ops.pairwise_distance import pairwise_distance
from fastmeta.ops.prototypes import prototypes


class NearestCentroid(Head):
    """The nearest class mean, by any metric: a ProtoNet without its encoder.

        c_n = mean of the support of class n,    logits = -scale * distance(query, c_n)

    Args:
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` (1 - cos) or ``"dot"`` (-x.y).
        scale: finite factor of the distances, an inverse temperature.
        normalize, center: see :class:`Head`.

    Raises:
        ValueError: ``metric`` is unknown or ``scale`` not finite.

    Source: Snell, Swersky, Zemel 2017 (arXiv 1703.05175), equation 2.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> head = fm.heads.NearestCentroid("euclidean")
        >>> head(torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1]), torch.tensor([[1.0]]))
        tensor([[-1., -3.]])
    """

    def __init__(
        self,
        metric: str = "sqeuclidean",
        scale: float = 1.0,
        *,
        normalize: bool = False,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(normalize=normalize, center=center)
        self.metric = check_choice("metric", metric, METRICS)
        self.scale = check_finite("scale", scale)

    def _logits(self, tasks: Tasks) -> Tensor:
        centres = prototypes(tasks.support, tasks.labels, tasks.num_classes)
        return -self.scale * pairwise_distance(tasks.query, centres, self.metric)


class SimpleShot(NearestCentroid):
    """The nearest class mean of centred features of length 1 ("CL2N").

        z = (x - center) / |x - center|,    logits = -scale * |z - c_n|^2

    Args:
        center: the mean feature ``[D]`` of the classes that the network was trained on. None leaves
            the centring out ("L2N").
        metric, scale, normalize: see :class:`NearestCentroid`.

    Source: Wang, Chao, Weinberger, van der Maaten 2019 (arXiv 1911.04623), section 3.

    Example:
        >>> import torch
        >>> import fastmeta as fm
        >>> features, labels = torch.randn(10, 64), torch.arange(5).repeat(2)
        >>> head = fm.heads.SimpleShot(center=torch.zeros(64))
        >>> head(features, labels, torch.randn(3, 64)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        metric: str = "sqeuclidean",
        scale: float = 1.0,
        *,
        normalize: bool = True,
        center: Tensor | None = None,
    ) -> None:
        super().__init__(metric, scale, normalize=normalize, center=center)


def check_finite(name: str, value: object) -> float:
    """``value`` as a float; TypeError if it is no number, ValueError if it is not finite."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)  # type: ignore[arg-type]
