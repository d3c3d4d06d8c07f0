"""Turns signals into a request to stop at the next step boundary."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Set by the first SIGTERM, SIGUSR1 or SIGINT on this rank; the ranks agree on it once a step (MAX)."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None
