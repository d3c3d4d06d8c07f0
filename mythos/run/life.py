"""One life of a run, from its start in the run directory to its end, as `mythos status` tells it afterwards."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from mythos.errors import FAILED as FAILED_CODE
from mythos.errors import UserError
from mythos.run.console import log
from mythos.run.directory import CONFIG_FILE, is_locked
from mythos.run.events import ENDED, FAILED, STARTED, append_event

LONGEST_MESSAGE = 500


class Life:
    """Around everything that a run does: whatever ends it is written down by the rank that knows.

    A start that fails before the directory is its own is a failure of the run too (its data may be gone), except where
    there is no run yet or another process trains there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._has_begun = False

    def begin(self) -> None:
        """The run directory is this life's own."""
        self._has_begun = True
        if dist.get_rank() == 0:
            append_event(self.directory, STARTED)

    def end(self, exit_code: int) -> None:
        """The run is finished, or saved to go on later."""
        if dist.get_rank() == 0:
            try:
                append_event(self.directory, ENDED, exit_code=exit_code)
            except OSError as error:  # the run itself has ended well
                log.error(f"{self.directory}: how the run ended was not written down ({error})")

    def fail(self, message: str, exit_code: int) -> None:
        """The run has failed, for a reason that this rank knows."""
        with suppress(OSError):  # a full disk may be what ends the run: that is what counts, not this line
            append_event(
                self.directory, FAILED, exit_code=exit_code, rank=dist.get_rank(), message=message[:LONGEST_MESSAGE]
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            return
        told_by_rank_0 = isinstance(error, UserError) and error.agreed
        if told_by_rank_0 and dist.get_rank() > 0:
            return
        if not self._has_begun and (not (self.directory / CONFIG_FILE).exists() or is_locked(self.directory)):
            return
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.fail(message, error.exit_code if isinstance(error, UserError) else FAILED_CODE)
