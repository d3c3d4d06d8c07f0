"""Turns signals into a request to stop after the current step, and into an exit when there is no time for that."""

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from mythos.errors import PREEMPTED
from mythos.ranks.exits import exit_now, exit_within, prepare_exit
from mythos.run.console import log

if TYPE_CHECKING:  # it imports torch, which must not delay the installation of the signal handlers
    from mythos.ranks.watchdog import Watchdog

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT, signal.SIGHUP)
"""What schedulers (USR2 and XCPU: LSF, Grid Engine), a user and a closed terminal send, and what would kill by default.

SIGQUIT is missing: it remains a way to end the process at once.
"""
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Left alone if they are ignored on entry: by nohup, or by a shell that starts a job in the background."""

SECOND_CTRL_C_S = 3.0
START_GRACE_S = 10.0


class StopRequest:
    """Set by the first of SIGNALS on this rank; the ranks combine their requests once per step.

    A second Ctrl-C, at least SECOND_CTRL_C_S after the first, ends the process at once. Other further signals have no
    effect.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.has_begun = False
        """Whether the ranks have met. Before, there is nothing to save, and the first signal ends the process."""
        self.saved = False
        """Whether everything of the run is saved."""
        self.watchdog: Watchdog | None = None
        """Reports to the other ranks and the journal when this process ends without saving."""
        self._asked_at = math.inf
        for number in SIGNALS:
            if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # An immediate second SIGINT is not a second Ctrl-C: launchers forward the one that every process has received.
        if self.asked and number == signal.SIGINT and now > self._asked_at + SECOND_CTRL_C_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.asked:
            self.signal_name, self._asked_at = signal.Signals(number).name, now

    @property
    def asked(self) -> bool:
        """Whether this rank has received a stop request."""
        return self.signal_name is not None

    def exit_after(self, grace_s: float) -> None:
        """From now on, end the process with PREEMPTED ``grace_s`` after the first signal, saved or not.

        Before the run has begun, it ends at once, or START_GRACE_S after a SIGTERM (``grace_s`` if that is shorter).

        Python runs signal handlers only between two instructions of the main thread, which may be blocked in a
        collective or a slow write. So a thread waits instead, and learns of the signal through a pipe.
        """
        prepare_exit()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._exit_after, args=(reader, grace_s), name="grace", daemon=True).start()
        if self.signal_name is not None:
            os.write(writer, bytes([signal.Signals[self.signal_name]]))

    def _exit_after(self, reader: int, grace_s: float) -> None:
        received = signal.Signals(os.read(reader, 1)[0])
        received_at = min(time.monotonic(), self._asked_at)
        # A launcher sends SIGTERM when another rank has failed. This rank may be about to find the same error, and
        # should end with its exit code.
        until = received_at + (min(START_GRACE_S, grace_s) if received == signal.SIGTERM else 0)
        while not self.has_begun and time.monotonic() < until:
            time.sleep(0.1)
        if self.has_begun:
            time.sleep(max(0.0, received_at + grace_s - time.monotonic()))
            outcome = "everything is saved, but the run has not ended" if self.saved else "not saved"
            message = f"{outcome} within {grace_s:g} s of the signal (preemption.grace_s)"
        else:
            message = f"stop requested ({received.name}) before the run began"
        exit_within(PREEMPTED)
        if self.watchdog is not None:
            self.watchdog.report_failure(message, PREEMPTED)
        log.error(f"mythos: {message}: exiting; the last complete checkpoint is intact: start again to resume")
        exit_now(PREEMPTED)
