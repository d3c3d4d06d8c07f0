"""The program `mythos`: runs a command of launch/commands.py and reports its errors, each on one line.

It imports the commands only once an interrupt is handled: they take a tenth of a second.
"""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from mythos.errors import BAD_INPUT, DONE, FAILED, UserError, printable

FAILED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF)

UNUSABLE_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""What is wrong with a path that a user gave, where even the question whether it exists fails."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; without arguments, run those of this process."""
    exit_code = _run(argv)
    try:
        sys.stderr.flush()
    except OSError:  # what could not be printed does not change the exit code
        _discard(sys.stderr)
    if argv is None and (exits := sys.modules.get("mythos.ranks.exits")) is not None:
        exits.exit_now(exit_code)  # a rank has done its work, and a library's destructor must not abort it now
    return exit_code


def _run(argv: Sequence[str] | None) -> int:
    try:
        if argv is None:
            _use_utf8()
            _prepare_streams()
            _check_working_directory()
            argv = sys.argv[1:]
            _check_utf8(argv)
        from launch.commands import invoke

        exit_code = invoke(argv)
        sys.stdout.flush()  # at the end of the process it is too late to report an error
        return exit_code
    except UserError as error:
        _report(str(error))
        return error.exit_code
    except BrokenPipeError:  # such as `mythos data show DIR | head`
        _discard(sys.stdout)
        return DONE
    except OSError as error:
        if error.filename is not None and error.errno in UNUSABLE_PATHS:
            _report(f"{error.filename}: {error.strerror}: give a path that this user can reach")
            return BAD_INPUT
        if error.filename is not None or error.errno not in FAILED_WRITES:
            raise
        _discard(sys.stdout)
        _report(f"the output cannot be written ({error.strerror}): free space, or write it to another place")
        return FAILED
    except KeyboardInterrupt:
        _report("interrupted")
        return FAILED


def _use_utf8() -> None:
    """Use UTF-8 for arguments, file names, files and output, here and in child processes, whatever the locale is.

    Python chooses the encoding when it starts, so that in a locale with another one this process starts again.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _prepare_streams() -> None:
    """Print any text in any environment; a closed stream discards it, here and in child processes.

    The descriptors are opened in place of the closed ones. Otherwise the next file that is opened, such as a shard or a
    checkpoint, would have number 1 or 2, and libraries would print into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
            os.set_inheritable(descriptor, True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - until the process ends
        # PYTHONIOENCODING may have set another encoding.
        getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace")


def _check_working_directory() -> None:
    """A process in a directory that has been removed cannot use relative paths, nor load MKL. Raises UserError."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working directory cannot be used ({error.strerror}): it may have been removed: change to another one"
        ) from None


def _check_utf8(arguments: Sequence[str]) -> None:
    """Configurations, manifests and journals are UTF-8 and could not hold another name. Raises UserError."""
    for argument in arguments:
        if os.fsencode(argument) != argument.encode("utf-8", errors="replace"):
            text = os.fsencode(argument).decode("utf-8", errors="backslashreplace")
            raise UserError(f"{text}: not UTF-8: rename the file, or give the text as UTF-8")


def _report(message: str) -> None:
    with suppress(OSError):
        print(printable(f"mythos: {message}"), file=sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard what the stream still holds, which Python would try to write again at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
