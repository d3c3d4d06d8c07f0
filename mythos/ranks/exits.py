"""Ends this process even if its threads, collectives or disk are blocked, or no further thread can be started."""

import logging
import math
import os
import signal
import threading
import time
from typing import NoReturn

from mythos.errors import UserError

GRACE_S = 5.0
KERNEL_GRACE_S = 5.0
"""How long after a requested exit the kernel ends a process whose interpreter is blocked, by SIGALRM."""

THREADS = 32
"""More than a rank starts with OMP_NUM_THREADS=1: about 25."""


class _Exit:
    """A thread that waits for the request to exit. It is started beforehand: later the limit may be reached."""

    def __init__(self) -> None:
        self._request = threading.Condition()
        self._exit_code, self._at = 0, math.inf
        threading.Thread(target=self._run, name="exit", daemon=True).start()

    def request(self, exit_code: int, after_s: float) -> None:
        """Exit then, unless an earlier exit was requested already."""
        with self._request:
            if (at := time.monotonic() + after_s) < self._at:
                self._exit_code, self._at = exit_code, at
                self._request.notify()

    def _run(self) -> None:
        with self._request:
            while (left_s := self._at - time.monotonic()) > 0:
                self._request.wait(None if math.isinf(left_s) else left_s)
        os._exit(self._exit_code)


_exit: _Exit | None = None


def prepare_exit() -> None:
    """Start the thread that ``exit_within`` needs, once, and check that all threads of a rank can be started.

    torch and its libraries end the process, or wait for ever, if they cannot start theirs.

    Raises:
        UserError: the limit of threads is too low.
    """
    global _exit
    if _exit is not None:
        return
    checked = threading.Event()
    try:
        _exit = _Exit()
        for _ in range(THREADS):
            threading.Thread(target=checked.wait, daemon=True).start()
    except RuntimeError as error:
        raise thread_limit_error(error) from error
    finally:
        checked.set()


def thread_limit_error(error: Exception) -> UserError:
    """The error of a process that cannot start a thread or a process."""
    return UserError(
        f"a rank needs up to {THREADS} threads, and one could not be started ({error}): raise the limit of the user's "
        "processes and threads (`ulimit -u`), or of the job's (pids.max of its cgroup)"
    )


def exit_now(exit_code: int) -> NoReturn:
    """End the process without waiting for its threads: those of a process group abort it if other ranks have ended."""
    logging.shutdown()
    os._exit(exit_code)


def exit_within(exit_code: int, after_s: float = GRACE_S) -> None:
    """End the process in ``after_s`` seconds even if what it is about to log or send blocks."""
    prepare_exit()
    assert _exit is not None
    _exit.request(exit_code, after_s)
    if signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.setitimer(signal.ITIMER_REAL, after_s + KERNEL_GRACE_S)


def _forget() -> None:
    global _exit
    _exit = None


os.register_at_fork(after_in_child=_forget)  # a fork has none of its parent's threads
