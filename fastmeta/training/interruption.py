"""Why a training ends early: a signal, or its time limit."""

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
    """Why to end the training: a signal came, or the time is up.

    Several processes end after the step in which the first of them has a reason.
    """

    _REASONS = ("SIGINT", "SIGTERM", "time limit")

    def __init__(self, minutes: float | None) -> None:
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._signal = self._agreed = ""
        self._before: dict[int, Any] = {}

    def reason(self) -> str:
        """The signal's name, ``"time limit"``, or ``""`` while the training may go on."""
        return self._own() if distributed.world_size() == 1 else self._agreed

    def votes(self) -> list[float]:
        """A number for each reason, not 0 for the one that this process has."""
        own = self._own()
        return [float(reason == own) for reason in self._REASONS]

    def count(self, votes: list[float]) -> None:
        """Take notice of the sum or mean of all processes' votes."""
        self._agreed = next((r for r, vote in zip(self._REASONS, votes, strict=True) if vote), "")

    def _own(self) -> str:
        return self._signal or ("time limit" if time.monotonic() >= self._deadline else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM; only a program's main thread can, elsewhere they stay as is."""
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
