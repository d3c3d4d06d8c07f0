"""The progress of data preparation: a bar on a terminal, a line every 30 seconds elsewhere."""

import time
from types import TracebackType
from typing import Self

from mythos.run.bar import Bar, can_draw
from mythos.run.console import print_note

LINE_EVERY_S = 30


class Progress:
    """Counts the bytes that all workers together have processed; shows MB, MB/s and the time left."""

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._what = what
        self._total = max(total_bytes, done_bytes)
        self._first = self._done = done_bytes
        self._started = self._last_line = time.monotonic()
        self._bar: Bar | None = None
        if total_bytes > done_bytes and can_draw():
            from rich.progress import DownloadColumn, TransferSpeedColumn

            self._bar = Bar(what, self._total, done_bytes, [DownloadColumn(), TransferSpeedColumn()])

    def __call__(self, done_bytes: int) -> None:
        """Count more bytes. The total is an estimate, and is never exceeded."""
        self._done = min(self._done + done_bytes, self._total)
        if self._bar is not None:
            self._bar.update(self._done)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print_note(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(self._total)
            self._bar.close()

    def _line(self) -> str:
        speed = (self._done - self._first) / (time.monotonic() - self._started)
        left_s = (self._total - self._done) / speed if speed else float("inf")
        return (
            f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {speed / 1e6:.2f} MB/s, "
            f"{left_s / 60:.1f} min left"
        )
