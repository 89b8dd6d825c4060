"""The state of the random generators, so that a recomputed step draws the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The current state of torch's default generators, on the CPU and on the device of the tasks.

    A step recomputed inside ``replay()`` draws the same numbers as the first time (the same dropout
    masks). Afterwards the generators continue as if nothing had been drawn.

    Example:
        >>> import torch
        >>> state = RandomState(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> with state.replay():
        ...     again = torch.rand(3)
        >>> torch.equal(first, again)
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [device] if device.type == "cuda" else []
        self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._cuda]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Set the generators to the kept state, in a ``with`` block."""
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._cuda, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
