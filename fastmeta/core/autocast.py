"""Autocast: switched off for updates, and restored when the adjoint runs a step again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes products on a device now; None if it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context without autocast, for updates of the inner loop: they keep their tensors' dtype."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class AutocastState:
    """The current autocast setting of a device type.

    A backward pass runs outside the user's autocast context, so the setting is kept for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device_type = device.type
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def restored(self) -> torch.autocast:
        """Context with the kept setting."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._enabled)
