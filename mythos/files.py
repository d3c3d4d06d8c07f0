"""Opening, atomic writes, flushes to the disk, hashes and locks: the only implementation of each in this project."""

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

CHUNK_BYTES = 1 << 24
TEMPORARY_SUFFIX = ".unfinished"
DIRECTORY_NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES)
"""How file systems, such as FUSE and network ones, refuse to open or to flush a directory."""
_warned_of: list[Path] = []
"""The directory that ``flush_directory`` has warned of, if there was one in this process."""


class NotRegularError(OSError):
    """A pipe, a device, a directory or, where links are refused, a link is in the place of a regular file."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(errno.EINVAL, "not a regular file", str(path))


def regular(path: str, flags: int) -> int:
    """An ``opener`` for ``open`` that refuses devices, and pipes, which wait for their other end. Raises OSError."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe opened for writing, a directory
            raise NotRegularError(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(path)
    return descriptor


def check_regular(path: Path) -> None:
    """Check that a library may open a file by its name (see ``regular``). Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegularError(path)


def open_regular(path: Path, follow_link: bool = True) -> BinaryIO:
    """A regular file, opened for reading. Raises OSError."""
    no_link = 0 if follow_link else os.O_NOFOLLOW
    return open(path, "rb", opener=lambda name, flags: regular(name, flags | no_link))


def open_to_append(path: Path) -> FileIO:
    """A regular file whose writes are appended at once, unbuffered. Raises OSError."""
    return open(path, "ab", buffering=0, opener=regular)


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file that is not larger than the limit. Raises OSError."""
    with open_regular(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {limit_bytes:,} bytes", str(path))
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it, even after a crash.

    Text is written as UTF-8. Raises OSError.
    """
    with opened_atomically(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write; renamed to ``path`` when the block ends, removed when the block raises. Raises OSError."""
    temporary = temporary_path(path)
    file = temporary.open("wb")
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    except BaseException:
        for clean_up in (file.close, temporary.unlink):  # may fail as well, which must not hide the first error
            with suppress(OSError):
                clean_up()
        raise


def temporary_path(path: Path) -> Path:
    """The file that this process writes before it is renamed to ``path``.

    The name holds host and process, because a process of a killed job may still be writing on another node.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file of ``opened_atomically``, which a killed process leaves behind."""
    return path.suffix == TEMPORARY_SUFFIX


def flush_file(path: Path) -> None:
    """Wait until the content of a file is on the disk. Raises OSError."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Flush the entries of a directory, such as a rename, to the disk.

    If the file system cannot do this, a warning is logged, once in a process: only a crash of the machine itself then
    loses the newest entries.

    Raises:
        OSError: the directory or its disk is gone or broken.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in DIRECTORY_NOT_FLUSHED:
            raise
        if not _warned_of:
            _warned_of.append(directory)
            logging.getLogger("mythos").warning(
                f"{directory}: this file system does not flush directories ({error.strerror}): if the machine crashes, "
                "the newest checkpoint may be missing, and the run resumes from the one before it"
            )


def hash_file(file: Path | BinaryIO, progress: Callable[[int], None] | None = None) -> str:
    """xxh3_64 of the content of a regular file, given by its path or open at any position. Raises OSError.

    Args:
        progress: is called with the number of bytes of each chunk that was read.
    """
    if isinstance(file, Path):
        with open_regular(file) as opened:
            return hash_file(opened, progress)
    digest = xxhash.xxh3_64()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()


def take_lock(file: IO[Any] | int, wait_s: float = 0.0, *, shared: bool = False, every_s: float = 0.05) -> bool:
    """Take an flock on an open file, retrying for ``wait_s`` seconds. Returns whether it was taken.

    The kernel releases the lock when the file is closed or the process ends, even after a kill.

    Raises:
        OSError: the file system does not support locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        time.sleep(every_s)
