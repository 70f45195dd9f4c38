"""SIGINT and SIGTERM as a question that the training loop asks after each step."""

import signal
from types import FrameType


class StopRequested(Exception):
    """Raised between two points that are saved anyway; see StopSignals.may_raise."""


class StopSignals:
    """While this context is open, the first SIGINT or SIGTERM is noted in `received` and the second one kills.

    `may_raise`: set it where nothing is lost by stopping at once (an evaluation after a save); a signal then raises
    StopRequested there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.may_raise = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread (a notebook, a server): whoever owns the process keeps its signals
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
