"""The shards of a prepared data set: as its MDS index lists them, and opened for reading.

An MDS shard of ``rows`` samples is: uint32 rows | uint32 offsets[rows + 1] | JSON config | samples. Our only column has
a fixed size, so the samples are a plain matrix at the end of the file. Rows are read with ``pread``. It is faster than
a memory map, which costs a page fault per row, and a file that is truncated while it is in use gives an error, where a
memory map would end the process with SIGBUS.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mythos.data.format import COLUMN, SHARD_HASH, Manifest, parse_json_object, read_data_file
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import hash_file

COMPRESSION = "zstd"


@dataclass(frozen=True)
class StoredFile:
    """A file as described in the index."""

    name: str
    bytes: int
    xxh3_64: str


@dataclass(frozen=True)
class Shard:
    """One shard: its rows, the raw file that is read, and the compressed file if it is stored compressed."""

    rows: int
    row_bytes: int
    raw: StoredFile
    packed: StoredFile | None

    @property
    def stored(self) -> StoredFile:
        """The file in the data set's directory."""
        return self.packed or self.raw


class Storage(Protocol):
    """Access to the shards of one split."""

    def check(self, shards: Sequence[Shard]) -> None:
        """Check that the shards exist, where that is cheap. Raises UserError."""

    def open(self, shard: Shard) -> BinaryIO:
        """Open the shard's raw file and check its hash. May be called from several threads. Raises UserError."""


def read_index(path: Path, manifest: Manifest, remedy: str) -> list[Shard]:
    """The shards that an index lists. Raises UserError if it is damaged or does not match the manifest."""
    index = parse_json_object(path, read_data_file(path), remedy)
    entries = index.get("shards")
    if index.get("version") != 2 or not isinstance(entries, list):
        raise UserError(f"{path}: not an MDS index of version 2; {remedy}")
    return [_parse_shard(path, number, entry, manifest, remedy) for number, entry in enumerate(entries)]


def _parse_shard(path: Path, number: int, entry: Any, manifest: Manifest, remedy: str) -> Shard:
    row_bytes = manifest.row_tokens * np.dtype(manifest.encoding.split(":")[1]).itemsize
    expected = {
        "format": "mds",
        "column_names": [COLUMN],
        "column_encodings": [manifest.encoding],
        "column_sizes": [row_bytes],
    }
    try:
        compression = entry["compression"]
        if compression is not None and str(compression).split(":")[0] != COMPRESSION:
            raise UserError(
                f"{path}: shard {number}: compression is {compression!r}, not {COMPRESSION} or none; {remedy}"
            )
        for name, value in expected.items():
            if entry[name] != value:
                raise UserError(
                    f"{path}: shard {number}: {name} is {entry[name]!r}, this data set needs {value!r}; {remedy}"
                )
        shard = Shard(
            rows=int(entry["samples"]),
            row_bytes=row_bytes,
            raw=_parse_file(entry["raw_data"]),
            packed=None if compression is None else _parse_file(entry["zip_data"]),
        )
        if shard.rows < 1 or shard.rows * row_bytes > shard.raw.bytes:
            raise ValueError(f"{shard.rows} samples in {shard.raw.bytes} bytes")
        return shard
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: shard {number}: damaged entry ({error!r}); {remedy}") from error


def _parse_file(entry: Any) -> StoredFile:
    name = str(entry["basename"])
    if Path(name).name != name:
        raise ValueError(f"basename {name!r}")
    digest = str(entry["hashes"][SHARD_HASH])
    if not re.fullmatch("[0-9a-f]{16}", digest):
        raise ValueError(f"{SHARD_HASH} {digest!r}")
    return StoredFile(name, int(entry["bytes"]), digest)


def file_problem(file: BinaryIO, expected: StoredFile) -> str | None:
    """What is wrong with an open file, its size or its hash, in a few words; None if it is as expected."""
    found_bytes = os.fstat(file.fileno()).st_size
    if found_bytes != expected.bytes:
        return f"{found_bytes} bytes, the index says {expected.bytes}"
    return None if hash_file(file) == expected.xxh3_64 else "damaged, its hash differs from the index"


def unpack(packed: Path, shard: Shard, target: BinaryIO) -> str | None:
    """Decompress a packed file into ``target``; returns what is wrong with the packed file, or None."""
    import zstd

    assert shard.packed is not None
    with packed.open("rb") as file:
        if problem := file_problem(file, shard.packed):
            return problem
    try:
        target.write(zstd.decompress(packed.read_bytes()))
    except zstd.Error as error:
        return f"damaged, cannot be decompressed ({error})"
    target.flush()
    return file_problem(target, shard.raw)


def check_files(directory: Path, shards: Sequence[Shard], remedy: str) -> None:
    """Raises UserError unless a directory holds every shard with its size."""
    sizes = {}
    with os_errors_as_user_errors(directory, remedy):
        for entry in os.scandir(directory):  # one listing: on a network file system it includes the sizes
            with suppress(FileNotFoundError):  # a dangling link
                sizes[entry.name] = entry.stat().st_size
    for shard in shards:
        name, expected = shard.stored.name, shard.stored.bytes
        if name not in sizes:
            raise UserError(f"{directory / name}: missing, but listed in the index; {remedy}")
        if sizes[name] != expected:
            raise UserError(f"{directory / name}: {sizes[name]} bytes, the index says {expected}; {remedy}")


class InPlace:
    """Shards read from the data set's directory. Compressed ones are unpacked into unnamed temporary files."""

    def __init__(self, directory: Path, remedy: str) -> None:
        self._directory = directory
        self._remedy = remedy

    def check(self, shards: Sequence[Shard]) -> None:
        """Raises UserError unless every shard exists with its size."""
        check_files(self._directory, shards, self._remedy)

    def open(self, shard: Shard) -> BinaryIO:
        """See ``Storage``."""
        path = self._directory / shard.stored.name
        when_full = (
            f"no space to unpack it in {tempfile.gettempdir()}; set data.cache_directory, or TMPDIR to a larger disk"
        )
        with os_errors_as_user_errors(path, self._remedy, when_full):
            if shard.packed is None:
                file: BinaryIO = path.open("rb")
                problem = file_problem(file, shard.raw)
            else:
                file = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the shard is in use
                problem = unpack(path, shard, file)
        if problem is not None:
            file.close()
            raise UserError(f"{path}: {problem}; {self._remedy}")
        return file


class OpenShard:
    """An open shard, whose rows can be read."""

    def __init__(self, file: BinaryIO, shard: Shard, name: str, remedy: str) -> None:
        """Raises UserError if the header of the file does not match the index."""
        self._file, self._shard, self._name, self._remedy = file, shard, name, remedy
        self._start = shard.raw.bytes - shard.rows * shard.row_bytes
        header = np.zeros(2, dtype="<u4")
        try:
            count = self._read_at(0, header)
            if count != header.nbytes or header.tolist() != [shard.rows, self._start]:
                raise UserError(f"{name}: its header does not match the index; {remedy}")
        except UserError:
            file.close()
            raise

    def read(self, row: int, into: np.ndarray) -> None:
        """Read one row into an array of the stored type."""
        count = self._read_at(self._start + row * self._shard.row_bytes, into)
        if count != self._shard.row_bytes:
            raise UserError(f"{self._name}: was truncated while in use; {self._remedy}")

    def _read_at(self, position: int, into: np.ndarray) -> int:
        with os_errors_as_user_errors(self._name, self._remedy):
            return os.preadv(self._file.fileno(), [into.data], position)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
