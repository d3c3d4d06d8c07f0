"""Shards of remote or packed data on a node's own disk: bounded, shared by all ranks and runs of the node.

    DIR/shards/HASH-BYTES          a whole raw shard, named by its content, so that data sets and runs share it
    DIR/partial/HASH-BYTES.*/      a download under way; its file `lock` is held by the process that makes it
    DIR/locks/                     one of 64 files is held while a shard is fetched, `room` while room is made

A shard gets its name by a rename, once it is whole. Locks are flock, which end with the process that holds them: what
a killed run leaves is an unheld partial directory, removed by the next. The locks on a fetch and on the room only
save a second download and a few bytes; who waits too long for one goes ahead, so that a stopped process holds nobody
up. Whoever has a shard open holds a shared lock on it. The shards longest not opened make room, never those that are
open: removed, they would still fill the disk. So the cache is as large as its limit, or as the shards that all runs of
the node have open, where these are more. What has a name of another kind is not ours and stays.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

from mythos.data import remote
from mythos.data.shards import Shard, check_files, file_problem, unpack
from mythos.errors import UserError

LOCKS = 64
FETCH_WAIT_S = 20.0
ROOM_WAIT_S = 10.0
ATTEMPTS = 2
GIB = 2**30
_SHARD = re.compile(r"[0-9a-f]{16}-\d+")
_PARTIAL = re.compile(r".+-\d+\.\w+")


class NodeCache:
    """The cache in a directory.

    Args:
        directory: on a disk of the node.
        limit_bytes: of all shards together, those being fetched included.

    Raises:
        UserError: the directory cannot be written, or its file system knows no locks.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = Path(directory)
        self.limit_bytes = limit_bytes
        self._shards, self._partial, self._locks = (self.directory / name for name in ("shards", "partial", "locks"))
        with self._told():
            for path in (self._shards, self._partial, self._locks):
                path.mkdir(parents=True, exist_ok=True)
            with self._room():
                self._remove_abandoned()

    def open(self, shard: Shard, origin: str) -> BinaryIO:
        """The raw shard, fetched if need be, its hash checked. May be called from several threads and processes.

        It keeps its place in the cache until the file is closed.

        Raises:
            UserError: it cannot be fetched, or the origin is damaged.
        """
        path = self._shards / f"{shard.raw.xxh3_64}-{shard.raw.bytes}"
        with self._told():
            while True:
                with self._fetching(path.name):
                    if not path.exists():
                        self._fetch(shard, origin, path)
                with suppress(FileNotFoundError):  # another process made room just now
                    file: BinaryIO = path.open("rb")
                    _lock(file, fcntl.LOCK_SH, ROOM_WAIT_S)
                    if file_problem(file, shard.raw) is None:
                        os.utime(file.fileno())
                        return file
                    file.close()
                    path.unlink()

    def fetch_metadata(self, origin: str, names: Sequence[str]) -> Path:
        """Fetch small files of a data set anew; returns the directory that holds them."""
        target = self.directory / "metadata" / _safe(origin)
        with self._told():
            for name in names:
                with self._partial_directory(_safe(name), 0) as partial:
                    remote.fetch(f"{origin}/{name}", partial / "file")
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial / "file", target / name)
        return target

    def _fetch(self, shard: Shard, origin: str, path: Path) -> None:
        """Fetch a shard whole to its place; a damaged one a second time."""
        needed_bytes = shard.raw.bytes + (shard.packed.bytes if shard.packed else 0)
        for _ in range(ATTEMPTS):
            with self._partial_directory(shard.raw.xxh3_64, needed_bytes) as partial:
                fetched, raw = partial / "fetched", partial / "raw"
                remote.fetch(origin, fetched)
                if shard.packed is None:
                    raw = fetched
                    with raw.open("rb") as file:
                        problem = file_problem(file, shard.raw)
                else:
                    with raw.open("w+b") as file:
                        problem = unpack(fetched, shard, file)
                if problem is None:
                    os.replace(raw, path)
                    return
        raise UserError(f"{origin}: {problem}; fetched {ATTEMPTS} times, so it is the data: copy or prepare it again")

    @contextmanager
    def _partial_directory(self, name: str, needed_bytes: int) -> Iterator[Path]:
        """A directory for a download, counted at its full size from the start."""
        with self._room():
            self._make_room(needed_bytes)
            partial = Path(tempfile.mkdtemp(prefix=f"{name}-{needed_bytes}.", dir=self._partial))
            lock = (partial / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.close()

    def _make_room(self, needed_bytes: int) -> None:
        """Remove the shards longest not opened until so many bytes fit. Called under the lock `room`."""
        self._remove_abandoned()
        # First what is under way: a shard that gets its name meanwhile may count twice, but never not at all.
        pending = sum(int(path.name.split("-")[-1].split(".")[0]) for path in _named(self._partial, _PARTIAL))
        found = []
        for path in _named(self._shards, _SHARD):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found) + pending + needed_bytes
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            total -= size if _remove_if_unused(path) else 0

    def _remove_abandoned(self) -> None:
        """Remove the downloads that no process makes any more."""
        for partial in _named(self._partial, _PARTIAL):
            try:
                with (partial / "lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except FileNotFoundError:  # its maker removes it, or was killed in the middle of making or removing it
                pass
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _room(self) -> Iterator[None]:
        with (self._locks / "room").open("w") as lock:
            _lock(lock, fcntl.LOCK_EX, ROOM_WAIT_S)
            yield

    @contextmanager
    def _fetching(self, name: str) -> Iterator[None]:
        with (self._locks / f"{int(name.split('-')[0], 16) % LOCKS:02d}").open("w") as lock:
            _lock(lock, fcntl.LOCK_EX, FETCH_WAIT_S)
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the cache's own disk as one line."""
        try:
            yield
        except OSError as error:
            remedy = {
                errno.ENOSPC: "lower data.cache_gib, or make room",
                errno.EDQUOT: "lower data.cache_gib, or make room",
            }.get(error.errno or 0, "give a directory on a disk of the node that can be written")
            raise UserError(f"data.cache_directory = {self.directory}: {error.strerror or error}; {remedy}") from error


def _lock(file: IO[Any], kind: int, wait_s: float) -> bool:
    """Lock an open file, or go ahead without it after some time; whether it is locked."""
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


def _named(directory: Path, name: re.Pattern[str]) -> list[Path]:
    return [path for path in directory.iterdir() if name.fullmatch(path.name)]


def _remove_if_unused(path: Path) -> bool:
    """Remove a shard that nobody has open; whether its bytes are free now."""
    try:
        with path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX, wait_s=0):
                return False
            path.unlink()
    except FileNotFoundError:
        pass  # removed by another process
    return True


class Cached:
    """Shards read through a cache (a ``Storage``).

    Args:
        origin: directory of the split, a path or the address of an object store.
    """

    def __init__(self, cache: NodeCache, origin: str, remedy: str) -> None:
        self._cache, self._origin, self._remedy = cache, origin, remedy

    def check(self, shards: Sequence[Shard]) -> None:
        """A path holds every shard with its size, or UserError; an object store is asked when a shard is needed."""
        if not remote.is_object_store(self._origin):
            check_files(Path(self._origin), shards, self._remedy)

    def open(self, shard: Shard) -> BinaryIO:
        """See ``Storage``."""
        return self._cache.open(shard, f"{self._origin}/{shard.stored.name}")


def _safe(text: str) -> str:
    """A file name for an address, and another one for any other address."""
    readable = "".join(character if character.isalnum() else "_" for character in text)
    return f"{readable}-{xxhash.xxh3_64_hexdigest(text.encode())}"
