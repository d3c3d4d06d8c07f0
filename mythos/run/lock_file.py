"""The file ``.lock`` of a run directory: who trains there, and whether that process is alive (see ``mythos.run.lock``).

An flock shows at once that its owner is alive, or, on the owner's own host, that it has ended. Where the file system
has no flock, or does not show those of other hosts, the time of the last beat is what remains.
"""

import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter

from mythos.errors import UserError
from mythos.files import open_regular, take_lock
from mythos.readers import Count, parse_json

FLOCK_WAIT_S = 1.0
"""Somebody who looks at the file holds its flock for a moment."""
SLOW_LOOK_S = 2.0
OWNER_BYTES = 4096
"""More of a file is not read: it is not a lock then."""


@dataclass(frozen=True)
class Owner:
    """The process that trains in a directory, as ``.lock`` describes it."""

    key: str
    """Random: another start of the same process number has another one."""
    host: str
    process: Count
    has_flock: bool

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


_OWNER = TypeAdapter(Owner)


@dataclass(frozen=True)
class Sight:
    """What one look at ``.lock`` shows."""

    owner: Owner | None
    """None if the file is just being written, or damaged."""
    modified_ns: int
    flock_is_held: bool
    slow: bool
    """The look took so long that the file server may be delaying the owner's beats, too."""

    @property
    def has_ended(self) -> bool:
        """Whether the owner is known to have ended: the kernel has released its flock."""
        owner = self.owner
        return not self.flock_is_held and owner is not None and owner.has_flock and owner.host == socket.gethostname()


def look(path: Path, with_flock: bool = True) -> Sight | None:
    """What ``.lock`` shows now; None if it does not exist.

    Opening the file makes a network file system fetch its present attributes.

    Raises:
        OSError: it cannot be read.
    """
    started = time.monotonic()
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with file:
        try:
            is_held = with_flock and not take_lock(file, shared=True)
        except OSError:  # a file system without flock
            is_held = False
        owner, modified_ns = _parse(file.read(OWNER_BYTES)), os.fstat(file.fileno()).st_mtime_ns
    return Sight(owner, modified_ns, is_held, time.monotonic() - started > SLOW_LOOK_S)


def create(path: Path, owner: Owner) -> IO[bytes] | None:
    """Create the file for this owner and take its flock if possible; None if the file exists already."""
    try:
        file = path.open("xb", buffering=0)
    except FileExistsError:
        return None
    try:
        has_flock = take_lock(file, FLOCK_WAIT_S)
    except OSError:  # a file system without flock
        has_flock = False
    try:
        file.write(json.dumps(asdict(owner) | {"has_flock": has_flock}).encode())
    except OSError:  # the disk is full
        file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def _parse(content: bytes) -> Owner | None:
    text = content.decode("utf-8", errors="replace")
    if match := re.fullmatch(r"process (\d+) on (\S+)", text):  # of version 0.1, which always had an flock
        return Owner("", match[2], int(match[1]), has_flock=True)
    try:
        return parse_json("", text, _OWNER, "")
    except UserError:
        return None
