"""Turns signals into a request to stop at the next step boundary."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SECOND_CTRL_C_S = 3.0


class StopRequest:
    """Set by the first SIGTERM, SIGUSR1 or SIGINT on this rank; the ranks agree on it once a step (MAX).

    A second Ctrl-C, some seconds after the first, ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._asked_at = 0.0
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # Not earlier: launchers pass on the Ctrl-C that the terminal has sent to every process already.
        if self.asked and number == signal.SIGINT and now > self._asked_at + SECOND_CTRL_C_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.asked:
            self.signal_name, self._asked_at = signal.Signals(number).name, now

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None
