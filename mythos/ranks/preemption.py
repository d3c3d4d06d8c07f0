"""Turns signals into a request to stop at the next step boundary, and into an exit when there is no time for that."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from mythos.errors import PREEMPTED
from mythos.run.console import log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SECOND_CTRL_C_S = 3.0
LEAVE_S = 5.0
START_GRACE_S = 10.0


class StopRequest:
    """Set by the first SIGTERM, SIGUSR1 or SIGINT on this rank; the ranks agree on it once a step (MAX).

    A second Ctrl-C, some seconds after the first, ends the process at once. Further signals change nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.has_begun = False
        """Whether the ranks have met: before, there is nothing to save, and the first signal ends the process."""
        self.saved = False
        """Whether the run has nothing left to save."""
        self._asked_at = 0.0
        self.before_leaving: Callable[[str, int], None] = lambda message, exit_code: None
        """Told why, and the exit code, when there was no time to save."""
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

    def leave_after(self, grace_s: float) -> None:
        """From now on: the process ends with PREEMPTED ``grace_s`` after the first signal, saved or not; where the run
        has not begun at once, or START_GRACE_S after a SIGTERM.

        The interpreter handles a signal only between two instructions of the main thread, which may wait in a
        collective or a slow write; so the time runs in a thread, which hears of the signal through a pipe.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._leave_after, args=(reader, grace_s), name="grace", daemon=True).start()
        if self.signal_name is not None:
            os.write(writer, bytes([signal.Signals[self.signal_name]]))

    def _leave_after(self, reader: int, grace_s: float) -> None:
        received = signal.Signals(os.read(reader, 1)[0])
        # A launcher, too, sends SIGTERM, when another rank has failed: this one may be about to find the same mistake,
        # and its exit code, which says more.
        until = time.monotonic() + (START_GRACE_S if received == signal.SIGTERM else 0)
        while not self.has_begun and time.monotonic() < until:
            time.sleep(0.1)
        if self.has_begun:
            time.sleep(grace_s)
            outcome = "everything is saved, but the run was not over" if self.saved else "not saved"
            message = f"{outcome} within {grace_s:g} s of the signal (preemption.grace_s)"
        else:
            message = f"asked to stop ({received.name}) before the run began"
        leave_in_any_case(PREEMPTED)
        self.before_leaving(message, PREEMPTED)
        log.error(f"mythos: {message}: leaving; the last complete checkpoint stands: start again to go on")
        logging.shutdown()
        os._exit(PREEMPTED)


def leave_in_any_case(exit_code: int, after_s: float = LEAVE_S) -> None:
    """End the process soon, even if what it still wants to write waits for a disk that has gone away."""
    timer = threading.Timer(after_s, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()
