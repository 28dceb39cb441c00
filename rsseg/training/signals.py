"""Ctrl-C and SIGTERM (Slurm, spot machines) end a run after the current step instead of in the middle of it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self


class StopSignals:
    """Context that remembers the first SIGINT or SIGTERM in `received`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and lets no other thread install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
