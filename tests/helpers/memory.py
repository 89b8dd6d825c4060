"""Peak memory of tensors, counted in bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable

from fastmeta.core.peak_bytes import PeakBytes


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of the bytes alive among those that ``run`` allocates."""
    gc.collect()
    gc.freeze()  # what is alive now: the next call would walk through all of it again
    with PeakBytes() as memory:
        run()
    return memory.peak
