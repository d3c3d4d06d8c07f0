"""The console: a progress bar on a terminal, plain lines elsewhere; and every rank's log in the run directory."""

import logging
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mythos.errors import printable
from mythos.files import regular
from mythos.run.bar import Bar, can_draw

log = logging.getLogger("mythos")
FORMAT = "%(asctime)s %(levelname)s %(message)s"
NOTICE_EVERY_S = 30.0


class Printable(logging.Formatter):
    """Lines without passwords and control characters: a message may quote a file, a name or another process."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class ConsoleHandler(logging.Handler):
    """Prints log lines to stderr, above the progress bar if there is one."""

    bar: Bar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.bar is None:
                print(self.format(record), file=sys.stderr, flush=True)
            elif not getattr(record, "is_on_bar", False):
                self.bar.print(self.format(record))
        except Exception:
            _report_lost_line(self, record)

    def close(self) -> None:
        """Also called by ``logging.shutdown``, so that a process that fails leaves the terminal in order."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        super().close()


class LogFile(logging.FileHandler):
    """Every rank's log in the run directory."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=regular)

    def handleError(self, record: logging.LogRecord) -> None:
        _report_lost_line(self, record)


def print_note(line: str) -> None:
    """Print a line to stderr, or nowhere if that is closed or full: the work must not end because of it."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def _report_lost_line(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Handle a line that could not be written. A full disk is ignored: it must not end the run or print tracebacks."""
    if not isinstance(sys.exc_info()[1], OSError):
        logging.Handler.handleError(handler, record)


def _log_failed_thread(failure: threading.ExceptHookArgs) -> None:
    """Log the error of a thread: in one line if its disk is full or gone, with a traceback otherwise."""
    name = failure.thread.name if failure.thread else "a thread"
    if isinstance(failure.exc_value, OSError):
        log.error(f"{name}: {failure.exc_value}")
    elif failure.exc_value is not None:
        log.error(f"{name} failed", exc_info=failure.exc_value)


def start_logging(log_file: Path | None, rank: int) -> None:
    """Rank 0 logs to the console, the other ranks only errors; each also to its log file once there is a directory."""
    log.setLevel(logging.INFO)
    log.propagate = False
    threading.excepthook = _log_failed_thread
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console = ConsoleHandler()
    console.setFormatter(Printable("%(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)  # an error may be known to one rank only
    log.addHandler(console)
    if log_file is not None:
        file = LogFile(log_file, encoding="utf-8")
        file.setFormatter(Printable(FORMAT))
        log.addHandler(file)


class Notices:
    """Logs how far a long activity is, every ``NOTICE_EVERY_S``; a short one logs nothing."""

    def __init__(self, activity: str, total: int, unit: str) -> None:
        self._activity, self._total, self._unit = activity, total, unit
        self._last_s = time.monotonic()

    def report(self, done: int) -> None:
        """``done`` of the total are done."""
        if time.monotonic() - self._last_s >= NOTICE_EVERY_S:
            self._last_s = time.monotonic()
            log.info(f"{self._activity}: {done:,} of {self._total:,} {self._unit}")


class Progress:
    """A bar with the loss on a terminal, a line per reported step elsewhere. The log file always gets the line."""

    def __init__(self, first_step: int, steps: int, rank: int) -> None:
        self._steps = steps
        self._console: ConsoleHandler | None = None
        console = next((handler for handler in log.handlers if isinstance(handler, ConsoleHandler)), None)
        if rank == 0 and console is not None and can_draw():
            columns = ["{task.completed:,.0f}/{task.total:,.0f} steps", "{task.fields[text]}"]
            console.bar = Bar("training", steps, first_step, columns)
            self._console = console

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        loss, speed = metrics["train/loss"], f"{metrics['perf/tokens_per_second']:,.0f} tokens/s"
        log.info(
            f"step {step}/{self._steps} loss {loss:.4f} "
            f"gradient norm {metrics['train/gradient_norm']:.3f} learning rate {metrics['train/learning_rate']:.2e} "
            f"{speed}",
            extra={"is_on_bar": True},
        )
        if self._console is not None and self._console.bar is not None:
            self._console.bar.update(step, f"loss {loss:.3f}, {speed}")

    def close(self) -> None:
        """Leave the bar as it is; later lines are printed below it."""
        if self._console is not None and self._console.bar is not None:
            self._console.bar.close()
            self._console.bar = None
