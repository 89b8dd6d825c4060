"""Which inner step is at work, for modules that have parameters of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STEP: ContextVar[int] = ContextVar("inner_step", default=0)


def current_step() -> int:
    """k while passes at theta_k run, the parameters after k inner steps; 0 elsewhere."""
    return _STEP.get()


@contextmanager
def inner_step(k: int) -> Iterator[None]:
    """Runs modules that have parameters of each inner step as at theta_k, those after k steps.

    ``MAML.meta_loss``, ``meta_gradient`` and ``adapt_tasks`` say it by themselves, and so do calls
    of what ``adapt_tasks`` returns. Calls of a module or of ``MAML.clone()`` do not: they run as at
    theta_0 unless they stand inside.

    Args:
        k: inner steps taken, at least 0.

    Raises:
        TypeError, ValueError: k is no integer, or less than 0.

    Example:
        >>> import torch
        >>> from fastmeta.models import PerStepBatchNorm1d, inner_step
        >>> norm = PerStepBatchNorm1d(1, steps=1)
        >>> with torch.no_grad():
        ...     norm.bias[1] = 3
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> with inner_step(1):
        ...     norm(x).mean().item()
        3.0
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an integer, got {k!r}")
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    before = _STEP.set(k)
    try:
        yield
    finally:
        _STEP.reset(before)
