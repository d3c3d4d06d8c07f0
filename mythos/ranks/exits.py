"""Ends this process even if its threads, its collectives or its disk are blocked."""

import logging
import os
import threading
from typing import NoReturn

GRACE_S = 5.0


def exit_now(exit_code: int) -> NoReturn:
    """End the process without waiting for its threads: those of a process group abort it if other ranks have ended."""
    logging.shutdown()
    os._exit(exit_code)


def exit_within(exit_code: int, after_s: float = GRACE_S) -> None:
    """End the process in ``after_s`` seconds even if what it is about to log or send blocks."""
    timer = threading.Timer(after_s, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()
