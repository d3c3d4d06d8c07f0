"""How far the work is, for a person: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_EVERY_S = 30


class Progress:
    """Counts the bytes that all workers together have worked off; shows MB, MB/s and the time left."""

    def __init__(self, what: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._what = what
        self._total = max(total_bytes, done_bytes)
        self._first = self._done = done_bytes
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and total_bytes > done_bytes:
            self._bar = tqdm(
                desc=what, total=self._total, initial=done_bytes, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def __call__(self, done_bytes: int) -> None:
        """So much more is done. The total is an estimate, and never passed."""
        before, self._done = self._done, min(self._done + done_bytes, self._total)
        if self._bar is not None:
            self._bar.update(self._done - before)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(self._total - self._done)
            self._bar.close()

    def _line(self) -> str:
        speed = (self._done - self._first) / (time.monotonic() - self._started)
        left_s = (self._total - self._done) / speed if speed else float("inf")
        return (
            f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {speed / 1e6:.2f} MB/s, "
            f"{left_s / 60:.1f} min left"
        )
