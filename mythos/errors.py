"""Errors that reach the user as one line, and the exit codes that scripts rely on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DONE = 0
FAILED = 1
BAD_INPUT = 2
FAILED_TO_SAVE = 74
PREEMPTED = 85


class UserError(Exception):
    """Something the user can correct. The message is one line (or one line a finding): value, place, remedy.

    The command line prints it without a traceback and exits with ``exit_code``.

    Args:
        agreed: every rank raises this same error, so that rank 0 alone reports it.
    """

    exit_code = BAD_INPUT

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class TrainingError(UserError):
    """The run itself failed (for example the loss stayed non-finite); the last checkpoint is intact. On all ranks."""

    exit_code = FAILED

    def __init__(self, message: str) -> None:
        super().__init__(message, agreed=True)


class SaveError(TrainingError):
    """Checkpoints could not be written several times in a row; the last complete one is intact. On all ranks."""

    exit_code = FAILED_TO_SAVE


@contextmanager
def os_errors_as_user_errors(place: object, remedy: str) -> Iterator[None]:
    """Turn an OSError into a UserError ``PLACE: REASON: REMEDY``; the reason names another file if one is to blame."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and Path(str(error.filename)) != Path(str(place)):
            reason = f"{reason} ({error.filename})"
        raise UserError(f"{place}: {reason}: {remedy}") from error
