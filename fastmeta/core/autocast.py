"""What a step runs under, kept so that the adjoint can run the same step again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class RandomState:
    """The state of torch's default generators now, on the CPU and on the device of the tasks.

    A step recomputed inside ``replay()`` draws the numbers it drew the first time (the same dropout
    masks); afterwards the generators stand where they stood, as if nothing had been drawn.

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
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._cuda, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in on a device now; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For what is computed in the dtype of its tensors: the updates of the inner loop."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class AutocastState:
    """The autocast setting of a device type now; a backward pass runs outside the user's own."""

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def restored(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._enabled)
