"""Files: written completely or not at all, hashed, locked, and read line by line."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

CHUNK_BYTES = 1 << 24
TEMPORARY_SUFFIX = ".unfinished"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of it, even after a crash.

    Text is written as UTF-8. Raises OSError.
    """
    with opened_atomically(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write: moved to ``path`` when the block ends, removed when it fails. Raises OSError."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be ``path``.

    It names host and process: a process of a killed job may still write on another node.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether a killed process left this file unfinished."""
    return path.suffix == TEMPORARY_SUFFIX


def flush_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(file: Path | BinaryIO) -> str:
    """xxh3_64 of the content of a file, given by its path or open at any position. Raises OSError."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return hash_file(opened)
    digest = xxhash.xxh3_64()
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def take_lock(file: IO[Any] | int, wait_s: float = 0.0, *, shared: bool = False, every_s: float = 0.05) -> bool:
    """Take an flock on an open file, trying again for ``wait_s`` seconds; whether it was taken.

    The lock ends when the file is closed or the process ends, however it ends.

    Raises:
        OSError: the file system has no locks.
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


def read_json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line, in order; empty when there is no file.

    A line that a kill or a full disk cut is left out.

    Args:
        last_bytes: read only so much of the end of the file.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None:
            file.seek(max(0, path.stat().st_size - last_bytes))
        text = file.read().decode("utf-8", errors="replace")
    objects = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects
