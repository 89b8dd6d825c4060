"""Early end of a training: by a signal, or by its time limit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastmeta import distributed


class Interruption:
    """Reason to end the training early: a signal, or the time limit.

    Several processes share a reason: all end after the step in which the first has one.
    """

    _REASONS = ("SIGINT", "SIGTERM", "time limit")

    def __init__(self, minutes: float | None) -> None:
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._signal = self._agreed = ""
        self._before: dict[int, Any] = {}

    def reason(self) -> str:
        """Name of the signal, ``"time limit"``, or ``""`` to continue."""
        return self._own() if distributed.world_size() == 1 else self._agreed

    def votes(self) -> list[float]:
        """A number for each reason: 1 for the one that this process has, else 0."""
        own = self._own()
        return [float(reason == own) for reason in self._REASONS]

    def count(self, votes: list[float]) -> None:
        """Adopt the reason that has a vote in the sum or mean over all processes."""
        self._agreed = next((r for r, vote in zip(self._REASONS, votes, strict=True) if vote), "")

    def _own(self) -> str:
        return self._signal or ("time limit" if time.monotonic() >= self._deadline else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM inside; in other threads than the main one Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()  # a second signal ends the program at once

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
