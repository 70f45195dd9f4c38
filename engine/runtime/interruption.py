"""SIGINT and SIGTERM as a flag that a loop checks after each step."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # as signal.signal takes and returns it


class StopRequested(Exception):
    """Raised by a signal while StopSignals.may_raise is set."""


class StopSignals:
    """A context in which the first SIGINT or SIGTERM only sets `received`, and the second one kills the process.

    may_raise: set it while nothing would be lost by stopping at once (an evaluation after a save). The first signal
        then also raises StopRequested.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.may_raise = False
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread (a notebook, a server): the owner of the process keeps its signals
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.may_raise:
            raise StopRequested

    @property
    def exit_code(self) -> int:
        """130 for SIGINT and 143 for SIGTERM, as a shell reports them."""
        return 128 + (self.received or signal.SIGTERM)
