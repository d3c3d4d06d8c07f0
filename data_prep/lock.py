"""One run at a time for one output: a lock that the system lets go when its process ends, however it ends."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mythos.errors import UserError

_LOCK_FILE = "lock"


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Make the directory if need be and hold its lock. Raises UserError when another process holds it.

    The block may remove the directory. What a killed run left in it stays, and its lock does not.
    """
    descriptor = _acquire(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(directory: Path) -> int:
    path = directory / _LOCK_FILE
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run has just ended and removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{directory}: {holder} is writing this output; wait for it or end it, or name another --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{directory}: its file system has no locks: start no second run for this output", file=sys.stderr)
        # The lock of a directory that was removed after it was opened keeps nobody out.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)
