"""What a step runs under, kept so that the adjoint can run the same step again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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
