"""Errors that reach the user as one line, and the exit codes that scripts rely on."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
FAILED_TO_SAVE = 74
PREEMPTED = 85


class UserError(Exception):
    """Something the user can mend. The message is one line (or one line a finding): value, place, remedy.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = BAD_INPUT
    agreed = False
    """Whether every rank raised it, so that one of them is enough to tell."""


class TrainingError(UserError):
    """The run itself failed (for example the loss stayed non-finite); the last checkpoint is intact."""

    exit_code = FAILED
    agreed = True


class SaveError(TrainingError):
    """Checkpoints cannot be written, time after time; the last complete one is intact."""

    exit_code = FAILED_TO_SAVE
