"""A progress bar at the bottom of the terminal, with the time left; lines can be printed above it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

REFRESH_S = 0.1
SPEED_PERIOD_S = 600.0
"""The time left follows from the speed over this period; a step of a large model takes a minute."""


def can_draw() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


class Bar:
    """A bar from 0 to ``total``, drawn by ``update`` and not by a thread.

    Once the terminal is closed, nothing is drawn: the work that the bar shows must not end with its terminal.
    """

    def __init__(self, description: str, total: int, completed: int, columns: "Sequence[str | ProgressColumn]") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            "{task.description}",
            BarColumn(),
            *columns,
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=SPEED_PERIOD_S,
        )
        self._task = self._progress.add_task(description, total=total, completed=completed, text="")
        self._drawn_s = time.monotonic()
        self._is_closed = False
        self._draw(self._progress.start)
        # rich hides it, and a killed process could not restore it
        self._draw(lambda: self._progress.console.show_cursor(True))

    def update(self, completed: int, text: str = "") -> None:
        """Set how much is done, and the text beside the bar (``{task.fields[text]}``)."""
        now_s = time.monotonic()
        is_due = now_s - self._drawn_s >= REFRESH_S
        self._draw(lambda: self._progress.update(self._task, completed=completed, text=text, refresh=is_due))
        if is_due:
            self._drawn_s = now_s

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        from rich.text import Text

        # Text, because the line may contain what rich takes for markup.
        self._draw(lambda: self._progress.console.print(Text(line), soft_wrap=True, highlight=False))

    def close(self) -> None:
        """Draw the last state and leave the bar where it is."""
        self._draw(self._progress.refresh)
        self._draw(self._progress.stop)

    def _draw(self, action: Callable[[], object]) -> None:
        if not self._is_closed:
            try:
                action()
            except OSError:
                self._is_closed = True
