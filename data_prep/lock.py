"""One run at a time for one output: a lock that the kernel releases when its process ends, even after a kill."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mythos.errors import UserError
from mythos.files import take_lock
from mythos.run.console import print_note

_LOCK_FILE = "lock"


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Create the directory if necessary and hold its lock. Raises UserError if another process holds it.

    The block may remove the directory. What a killed run left in the directory stays, but its lock is released.
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
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just ended and removed the directory
            continue
        try:
            if not take_lock(descriptor):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise UserError(
                    f"{directory}: {holder} is writing this output; wait for it or end it, or choose another --output"
                )
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print_note(
                f"{directory}: its file system does not support locks: do not start a second run for this output"
            )
        # If the file was removed after it was opened, this lock does not exclude other processes.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)
