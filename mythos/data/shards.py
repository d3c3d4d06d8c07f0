"""The shards of a prepared data set: as its MDS index lists them, and opened for reading.

An MDS shard of ``rows`` samples is: uint32 rows | uint32 offsets[rows + 1] | JSON config | samples. Our only column has
a fixed size, so the samples are a plain matrix at the end of the file. Rows are read with ``pread``. It is faster than
a memory map, which costs a page fault per row, and a file that is truncated while it is in use gives an error, where a
memory map would end the process with SIGBUS.
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.data.format import COLUMN, SHARD_HASH, Manifest, read_data_file
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import hash_file, open_regular
from mythos.readers import Count, parse_json

COMPRESSION = "zstd"
FileBytes = Annotated[int, Field(strict=True, ge=0, le=2**32)]
"""The offsets in an MDS shard have 32 bits."""


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


class _StoredFile(TypedDict):
    """What an index says about a file; further fields are ignored."""

    basename: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    bytes: FileBytes
    hashes: dict[str, str]


class _Entry(TypedDict):
    """What an index says about a shard."""

    format: str
    column_names: list[str]
    column_encodings: list[str | None]
    column_sizes: list[Count | None]
    compression: str | None
    samples: Annotated[int, Field(strict=True, ge=1, le=2**32)]
    size_limit: Count | None
    raw_data: _StoredFile
    zip_data: _StoredFile | None


class _Index(TypedDict):
    """The content of index.json."""

    version: Count
    shards: list[_Entry]


_INDEX = TypeAdapter(_Index)


def read_entries(path: Path, manifest: Manifest, remedy: str) -> list[dict[str, Any]]:
    """The entries of an index. Raises UserError if it is damaged or does not match the manifest."""
    index = parse_json(path, read_data_file(path), _INDEX, remedy)
    if index["version"] != 2:
        raise UserError(f"{path}: not an MDS index of version 2; {remedy}")
    row_bytes = manifest.row_tokens * np.dtype(manifest.encoding.split(":")[1]).itemsize
    expected = {
        "format": "mds",
        "column_names": [COLUMN],
        "column_encodings": [manifest.encoding],
        "column_sizes": [row_bytes],
    }
    entries: list[dict[str, Any]] = [{**entry} for entry in index["shards"]]
    for number, entry in enumerate(entries):
        if problem := _problem(entry, expected, row_bytes):
            raise UserError(f"{path}: shard {number}: {problem}; {remedy}")
    return entries


def read_index(path: Path, manifest: Manifest, remedy: str) -> list[Shard]:
    """The shards that an index lists. Raises UserError if it is damaged or does not match the manifest."""
    return [
        Shard(
            rows=entry["samples"],
            row_bytes=entry["column_sizes"][0],
            raw=_stored_file(entry["raw_data"]),
            packed=_stored_file(entry["zip_data"]) if entry["compression"] else None,
        )
        for entry in read_entries(path, manifest, remedy)
    ]


def _problem(entry: Mapping[str, Any], expected: Mapping[str, Any], row_bytes: int) -> str | None:
    compression, packed = entry["compression"], entry["zip_data"]
    if compression is not None and compression.split(":")[0] != COMPRESSION:
        return f"compression is {compression!r}, not {COMPRESSION} or none"
    for name, value in expected.items():
        if entry[name] != value:
            return f"{name} is {entry[name]!r}, this data set needs {value!r}"
    if (compression is None) != (packed is None):
        return f"damaged entry (compression is {compression!r}, zip_data is {'missing' if packed is None else 'given'})"
    for stored in filter(None, (entry["raw_data"], packed)):
        if not re.fullmatch("[0-9a-f]{16}", stored["hashes"].get(SHARD_HASH, "")):
            return f"damaged entry ({stored['basename']} has no {SHARD_HASH} of 16 digits)"
    if entry["samples"] * row_bytes > entry["raw_data"]["bytes"]:
        return f"damaged entry ({entry['samples']} samples in {entry['raw_data']['bytes']} bytes)"
    return None


def _stored_file(entry: Mapping[str, Any]) -> StoredFile:
    return StoredFile(entry["basename"], entry["bytes"], entry["hashes"][SHARD_HASH])


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
    with open_regular(packed) as file:
        if problem := file_problem(file, shard.packed):
            return problem
        file.seek(0)
        content = file.read(shard.packed.bytes)
    try:
        target.write(zstd.decompress(content))
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
                file: BinaryIO = open_regular(path)
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
