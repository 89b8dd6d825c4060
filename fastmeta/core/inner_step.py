"""The number of the current inner step, for modules with parameters for each step.

theta_k are the parameters after k inner steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastmeta.core.checks import check_integer

_STEP: ContextVar[int] = ContextVar("inner_step", default=0)


def current_step() -> int:
    """k during passes at theta_k; 0 outside the inner loop."""
    return _STEP.get()


@contextmanager
def inner_step(k: int) -> Iterator[None]:
    """Run modules with parameters for each inner step as at theta_k, in a ``with`` block.

    ``MAML.meta_loss``, ``meta_gradient`` and ``adapt_tasks`` set k by themselves, and so do calls
    of the result of ``adapt_tasks``. Calls of a module or of ``MAML.clone()`` do not: outside of
    the block they run as at theta_0.

    Args:
        k: inner steps taken, at least 0.

    Raises:
        TypeError, ValueError: k is not an integer, or less than 0.

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
    check_integer("k", k, 0)
    before = _STEP.set(k)
    try:
        yield
    finally:
        _STEP.reset(before)
