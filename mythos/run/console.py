"""What a person sees: a progress bar on a terminal, plain lines elsewhere; every rank's log in the run directory."""

import logging
import sys
import threading
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("mythos")
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _AboveTheBar(logging.Handler):
    """Lines on the terminal that do not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            _lost(self, record)


class _LogFile(logging.FileHandler):
    """Every rank's log in the run directory."""

    def handleError(self, record: logging.LogRecord) -> None:
        _lost(self, record)


def _lost(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Called for a line that could not be written: a disk that is full must not end the run, nor speak for itself."""
    if not isinstance(sys.exc_info()[1], OSError):
        logging.Handler.handleError(handler, record)


def _tell_of_thread(failure: threading.ExceptHookArgs) -> None:
    """A thread that fails tells so in the log; one that writes to a disk which is full or gone, in one line."""
    name = failure.thread.name if failure.thread else "a thread"
    if isinstance(failure.exc_value, OSError):
        log.error(f"{name}: {failure.exc_value}")
    elif failure.exc_value is not None:
        log.error(f"{name} failed", exc_info=failure.exc_value)


def start_logging(log_file: Path | None, rank: int) -> None:
    """Rank 0 logs to the console, the other ranks only errors; each also to its log file once there is a directory."""
    log.setLevel(logging.INFO)
    log.propagate = False
    threading.excepthook = _tell_of_thread
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console = _AboveTheBar()
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)  # a rank alone with its error must be heard
    log.addHandler(console)
    if log_file is not None:
        file = _LogFile(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter(FORMAT))
        log.addHandler(file)


class Progress:
    """A bar with the loss on a terminal; a line a report elsewhere. The log file always gets the line."""

    def __init__(self, first_step: int, steps: int, rank: int) -> None:
        self._steps = steps
        self._bar = None
        if rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        line = (
            f"step {step}/{self._steps} loss {metrics['train/loss']:.4f} "
            f"gradient norm {metrics['train/gradient_norm']:.3f} learning rate {metrics['train/learning_rate']:.2e} "
            f"{metrics['perf/tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is None:
            log.info(line)
            return
        for handler in log.handlers:  # the bar shows it on the terminal
            if isinstance(handler, logging.FileHandler):
                handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, line, (), None))
        self._bar.set_postfix_str(
            f"loss {metrics['train/loss']:.3f}, {metrics['perf/tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
