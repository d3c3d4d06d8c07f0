"""Errors that are reported to the user as one line, and the exit codes that scripts rely on."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

DONE = 0
FAILED = 1
BAD_INPUT = 2
FAILED_TO_SAVE = 74
PREEMPTED = 85
# A path object of an address has one slash.
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*:/+[^\s/:@\"']*:)[^\s/\"']*@", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, change the terminal or the direction of text; line ends and tabs are none."""


def masked(text: str) -> str:
    """The text with ``***`` in place of the password in every address, such as sftp://user:password@host/directory."""
    return _PASSWORD.sub(r"\1***@", text)


class UserError(Exception):
    """A mistake that the user can correct. The message is one line for each finding: place, value, remedy.

    The command line prints it without a traceback and exits with ``exit_code``.

    Args:
        agreed: every rank raises this same error, so only rank 0 reports it.
    """

    exit_code = BAD_INPUT

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(masked(message))
        self.agreed = agreed


class TrainingError(UserError):
    """Training failed, for example because the loss stayed non-finite; the last checkpoint is valid. On all ranks."""

    exit_code = FAILED

    def __init__(self, message: str) -> None:
        super().__init__(message, agreed=True)


class SaveError(TrainingError):
    """Several checkpoints in a row could not be written; the last complete one is valid. On all ranks."""

    exit_code = FAILED_TO_SAVE


@contextmanager
def os_errors_as_user_errors(place: object, remedy: str, when_full: str | None = None) -> Iterator[None]:
    """Turn an OSError into a UserError ``PLACE: REASON: REMEDY``; the reason names another file if one is to blame.

    Args:
        when_full: the remedy if the disk is full or a quota is exceeded.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and not str(place).endswith(str(error.filename)):
            reason = f"{reason} ({error.filename})"
        if when_full is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = when_full
        raise UserError(f"{place}: {reason}: {remedy}") from error


def printable(text: str) -> str:
    """A text for a terminal or a log: ``masked``, and with escapes for control characters, which a file may hold."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), masked(text))
