"""Sinusoid regression, the synthetic problem of the MAML paper."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from fastmeta.core.checks import check_count
from fastmeta.data.episode import Episode


class Sinusoid:
    """Regression tasks y = A sin(x - phi), each with its own A and phi (Finn et al. 2017, MAML).

    Args:
        amplitude: range of A, drawn uniformly; default (0.1, 5).
        phase: range of phi in radians, drawn uniformly; default (0, pi).
        x_range: range of x, drawn uniformly; default (-5, 5).

    Raises:
        TypeError: a range is not a pair of numbers.
        ValueError: a range is not finite or ends before it begins.

    Example::

        >>> import numpy as np
        >>> from fastmeta.data import Sinusoid
        >>> rng = np.random.default_rng(0)
        >>> episode = Sinusoid().sample(rng, tasks=25, ways=1, shots=10, queries=10)
        >>> episode.support_x.shape, episode.support_y.dtype
        (torch.Size([25, 10, 1]), torch.float32)
    """

    def __init__(
        self,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        self.amplitude = _check_range("amplitude", amplitude)
        self.phase = _check_range("phase", phase)
        self.x_range = _check_range("x_range", x_range)
        self.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> Sinusoid:
        """Source whose episodes are on ``device``."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def check(self, ways: int, shots: int, queries: int) -> None:
        """Raise ValueError unless ``ways`` is 1 and the counts are in range."""
        if check_count("ways", ways, least=1) != 1:
            raise ValueError(f"ways: expected 1, sinusoid tasks are regression, got {ways}")
        check_count("shots", shots, least=1)
        check_count("queries", queries, least=0)

    def sample(
        self, rng: np.random.Generator, tasks: int, ways: int, shots: int, queries: int
    ) -> Episode:
        """Draw T tasks of S = ``shots`` support and Q = ``queries`` query points.

        Returns:
            Episode of float32 tensors: x and y [T, S, 1] and [T, Q, 1].

        Raises:
            ValueError: as :meth:`check`; or ``tasks`` is negative.
        """
        self.check(ways, shots, queries)
        tasks = check_count("tasks", tasks, least=0)
        amplitude = rng.uniform(*self.amplitude, size=(tasks, 1, 1))
        phase = rng.uniform(*self.phase, size=(tasks, 1, 1))
        x = rng.uniform(*self.x_range, size=(tasks, shots + queries, 1)).astype(np.float32)
        # The sine is computed on the CPU in float64: the data are the same on every device.
        y = (amplitude * np.sin(x.astype(np.float64) - phase)).astype(np.float32)
        parts = (x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])
        return Episode(
            *(torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in parts)
        )


def _check_range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a pair of numbers (low, high), got {value!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}: expected finite low <= high, got ({low}, {high})")
    return low, high
