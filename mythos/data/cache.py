"""A cache on a node's own disk for the shards of remote or compressed data, shared by all ranks and runs of the node.

    DIR/shards/HASH-BYTES          a complete raw shard, named by its content, so that data sets and runs share it
    DIR/partial/HASH-BYTES.*/      a download in progress; the process that makes it holds the lock on its file `lock`
    DIR/locks/                     one of 64 files is locked while a shard is fetched, `room` while space is freed
    DIR/metadata/                  manifests, tokenizers and indexes of data sets in an object store

A shard gets its name when it is complete. All locks are flock, which the kernel releases when a process ends: a killed
run leaves an unlocked partial directory, which the next run removes. The fetch and room locks only save a second
download and a few bytes; a process that has waited too long for one continues without it, so a stopped process does not
block the others. A process that has a shard open holds a shared lock on it. To free space, the least recently opened
shards are removed, but never open ones, which would occupy the disk until they are closed. So the size of the cache is
at most its limit, or the size of all shards that the runs of the node have open if that is larger. Files whose names do
not have this form are not touched.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from mythos.data import remote
from mythos.data.shards import Shard, check_files, file_problem, unpack
from mythos.errors import UserError, masked, os_errors_as_user_errors
from mythos.files import open_regular, regular, take_lock

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
        limit_bytes: of all shards together, including those that are being fetched.

    Raises:
        UserError: the directory cannot be written, or its file system does not support locks.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = Path(directory)
        self.limit_bytes = limit_bytes
        self._shards, self._partial, self._locks = (self.directory / name for name in ("shards", "partial", "locks"))
        with self._disk_errors():
            for path in (self._shards, self._partial, self._locks):
                path.mkdir(parents=True, exist_ok=True)
            with self._room_lock():
                self._remove_abandoned()

    def open(self, shard: Shard, origin: str) -> BinaryIO:
        """Open the raw shard, after fetching it if necessary; its hash is checked. Thread and process safe.

        The shard stays in the cache until the file is closed.

        Raises:
            UserError: it cannot be fetched, or the origin is damaged.
        """
        path = self._shards / f"{shard.raw.xxh3_64}-{shard.raw.bytes}"
        with self._disk_errors():
            while True:
                with self._fetch_lock(path.name):
                    if not path.exists():
                        self._fetch(shard, origin, path)
                with suppress(FileNotFoundError):  # another process has just removed it to free space
                    file: BinaryIO = open_regular(path)
                    take_lock(file, ROOM_WAIT_S, shared=True)
                    if file_problem(file, shard.raw) is None:
                        os.utime(file.fileno())
                        return file
                    file.close()
                    path.unlink()

    def fetch_metadata(self, origin: str, names: Sequence[str]) -> Path:
        """Fetch small files of a data set, even if they are in the cache; returns the directory that holds them."""
        target = self.directory / "metadata" / _file_name(origin)
        with self._disk_errors():
            for name in names:
                with self._partial_directory(_file_name(name), 0) as partial:
                    remote.fetch(f"{origin}/{name}", partial / "file")
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial / "file", target / name)
        return target

    def _fetch(self, shard: Shard, origin: str, path: Path) -> None:
        """Fetch a complete shard to its place, a second time if the first copy is damaged."""
        needed_bytes = shard.raw.bytes + (shard.packed.bytes if shard.packed else 0)
        for _ in range(ATTEMPTS):
            with self._partial_directory(shard.raw.xxh3_64, needed_bytes) as partial:
                fetched, raw = partial / "fetched", partial / "raw"
                remote.fetch(origin, fetched)
                if shard.packed is None:
                    raw = fetched
                    with open_regular(raw) as file:
                        problem = file_problem(file, shard.raw)
                else:
                    with raw.open("w+b") as file:
                        problem = unpack(fetched, shard, file)
                if problem is None:
                    os.replace(raw, path)
                    return
        raise UserError(
            f"{origin}: {problem}; fetched {ATTEMPTS} times, so the original is damaged: copy or prepare it again"
        )

    @contextmanager
    def _partial_directory(self, name: str, needed_bytes: int) -> Iterator[Path]:
        """A directory for a download, which counts with its final size from the start."""
        with self._room_lock():
            self._free_space(needed_bytes)
            partial = self._partial / f"{name}-{needed_bytes}.{uuid.uuid4().hex}"
            partial.mkdir()
            lock = _open_lock(partial / "lock")
            take_lock(lock, ROOM_WAIT_S)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.close()

    def _free_space(self, needed_bytes: int) -> None:
        """Remove the least recently opened shards until ``needed_bytes`` fit. Called under the lock `room`."""
        self._remove_abandoned()
        # Downloads first: a shard that is renamed meanwhile may then count twice, but is never missed.
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
        """Remove the downloads whose process has ended."""
        for partial in _named(self._partial, _PARTIAL):
            # Without its lock file, a download is being removed, or its process was killed before or after it.
            with suppress(FileNotFoundError), _open_lock(partial / "lock") as lock:
                if not take_lock(lock):
                    continue
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _room_lock(self) -> Iterator[None]:
        with _open_lock(self._locks / "room") as lock:
            take_lock(lock, ROOM_WAIT_S)
            yield

    @contextmanager
    def _fetch_lock(self, name: str) -> Iterator[None]:
        with _open_lock(self._locks / f"{int(name.split('-')[0], 16) % LOCKS:02d}") as lock:
            take_lock(lock, FETCH_WAIT_S)
            yield

    def _disk_errors(self) -> AbstractContextManager[None]:
        """Report failures of the cache's own disk as one line."""
        return os_errors_as_user_errors(
            f"data.cache_directory = {self.directory}",
            "choose a writable directory on a disk of the node",
            when_full="lower data.cache_gib, or free space",
        )


def _open_lock(path: Path) -> BinaryIO:
    return open(path, "wb", opener=regular)


def _named(directory: Path, name: re.Pattern[str]) -> list[Path]:
    return [path for path in directory.iterdir() if name.fullmatch(path.name)]


def _remove_if_unused(path: Path) -> bool:
    """Remove a shard that no process has open. Returns whether its space is free now."""
    with suppress(FileNotFoundError), open_regular(path) as file:  # missing: another process has removed it
        if not take_lock(file):
            return False
        path.unlink()
    return True


class Cached:
    """Shards that are read through a cache (a ``Storage``).

    Args:
        origin: directory of the split, a path or the address of an object store.
    """

    def __init__(self, cache: NodeCache, origin: str, remedy: str) -> None:
        self._cache, self._origin, self._remedy = cache, origin, remedy

    def check(self, shards: Sequence[Shard]) -> None:
        """Check that a path holds every shard with its size. Not for object stores: one request per shard."""
        if not remote.is_object_store(self._origin):
            check_files(Path(self._origin), shards, self._remedy)

    def open(self, shard: Shard) -> BinaryIO:
        """See ``Storage``."""
        return self._cache.open(shard, f"{self._origin}/{shard.stored.name}")


def _file_name(address: str) -> str:
    """A file name for an address, different for every address."""
    readable = "".join(character if character.isalnum() else "_" for character in masked(address))
    return f"{readable}-{xxhash.xxh3_64_hexdigest(address.encode())}"
