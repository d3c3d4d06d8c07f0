"""Files that are whole or not there, and full disks told in one line."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mythos.errors import UserError

_SEEN_WITHIN_S = 60.0


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns a failure to write there into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror or error}); free space or name another --output, and "
            "run again: finished parts are kept"
        ) from error


def publish(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    with publishing(path) as file:
        file.write(content)


@contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """A file to write: at the end of the block it is there whole, or, after an error, not at all."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether it is what a killed worker left unfinished."""
    return path.suffix == ".unfinished"


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be ``path``."""
    # Not the same for two processes: one of a killed run may still be at work on another node.
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")


def wait_to_see(written: Callable[[], bool]) -> None:
    """Wait for what another node has just written: a network file system may know for a while that it is not there."""
    until = time.monotonic() + _SEEN_WITHIN_S
    while not written() and time.monotonic() < until:
        time.sleep(0.5)
