"""The stacks of this process's threads, for the log of a run that hangs."""

import faulthandler
import logging
import sys
from contextlib import suppress
from typing import Any

from mythos.run.console import log


def write_stacks(reason: str) -> None:
    """Write the stacks of all threads to this rank's log."""
    for stream in _streams():
        with suppress(OSError):  # the disk may be full, but the run must end anyway
            stream.write(f"{reason}; the stacks of all threads:\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()


def stacks_stream() -> Any:
    """Where they are written; None if the console is closed and there is no log."""
    return next(iter(_streams()), None)


def _streams() -> list[Any]:
    """The rank's log; before it is open, the console."""
    logs: list[Any] = [h.stream for h in log.handlers if isinstance(h, logging.FileHandler)]
    return [stream for stream in logs or [sys.stderr] if stream is not None]
