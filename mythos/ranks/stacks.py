"""The stacks of this process's threads, for the log of a run that hangs."""

import faulthandler
import logging
import sys
from contextlib import suppress
from typing import Any

from mythos.run.console import log


def write_stacks(reason: str) -> None:
    """Write the stacks of all threads to this rank's log."""
    for stream in filter(None, _streams()):
        with suppress(OSError):  # the disk may be full, but the run must end anyway
            stream.write(f"{reason}; the stacks of all threads:\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()


def write_stacks_and_exit_later(after_s: float) -> None:
    """Unless called again within ``after_s``, write the stacks and end the process; replaces the call before.

    This works although no thread gets the interpreter's lock: faulthandler's own thread does not need it.
    """
    if (stream := _streams()[0]) is not None:
        faulthandler.dump_traceback_later(after_s, exit=True, file=stream)


def cancel_exit() -> None:
    """Cancel the last ``write_stacks_and_exit_later``."""
    faulthandler.cancel_dump_traceback_later()


def _streams() -> list[Any]:
    """The rank's log; before it is open, the console."""
    return [h.stream for h in log.handlers if isinstance(h, logging.FileHandler)] or [sys.stderr]
