"""The shards of a prepared data set, as its MDS index lists them, and one of them open for reading.

An MDS shard of ``rows`` samples is: uint32 rows | uint32 offsets[rows + 1] | JSON config | samples. Our only column has
a fixed size, so the samples are a plain matrix at the end of the file. Rows are read with ``pread``, which is faster
than a memory map (no page fault a row), and a file that is cut or taken away while it is in use is an error and not
a signal.
"""

import errno
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import xxhash

from mythos.data.format import COLUMN, SHARD_HASH, Manifest, parse_json_object, read_data_file
from mythos.errors import UserError

_HASH_CHUNK_BYTES = 1 << 24
COMPRESSION = "zstd"


@dataclass(frozen=True)
class StoredFile:
    """A file as the index describes it."""

    name: str
    bytes: int
    xxh3_64: str


@dataclass(frozen=True)
class Shard:
    """One shard: the rows it holds, the file that is read, and the packed file that it is stored in, if it is."""

    rows: int
    row_bytes: int
    raw: StoredFile
    packed: StoredFile | None

    @property
    def stored(self) -> StoredFile:
        """The file that lies in the data set."""
        return self.packed or self.raw


class Storage(Protocol):
    """Where the shards of one split lie."""

    def check(self, shards: Sequence[Shard]) -> None:
        """Find what is missing at once, as far as it costs little. Raises UserError."""

    def open(self, shard: Shard) -> BinaryIO:
        """The shard's raw file, its hash checked. May be called from several threads. Raises UserError."""


def read_index(path: Path, manifest: Manifest, remedy: str) -> list[Shard]:
    """The shards that an index names. Raises UserError when it is damaged or of another kind than the manifest says."""
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
    """What is wrong with an open file, in a few words: its size or its hash; None when it is whole."""
    found_bytes = os.fstat(file.fileno()).st_size
    if found_bytes != expected.bytes:
        return f"{found_bytes} bytes, the index says {expected.bytes}"
    digest = xxhash.xxh3_64()
    file.seek(0)
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return None if digest.hexdigest() == expected.xxh3_64 else "damaged, its hash differs from the index"


def unpack(packed: Path, shard: Shard, target: BinaryIO) -> str | None:
    """Write the raw form of a packed file; returns what is wrong with the packed file, or None."""
    import zstd

    assert shard.packed is not None
    with packed.open("rb") as file:
        if problem := file_problem(file, shard.packed):
            return problem
    try:
        target.write(zstd.decompress(packed.read_bytes()))
    except zstd.Error as error:
        return f"damaged, cannot be unpacked ({error})"
    target.flush()
    return file_problem(target, shard.raw)


def check_files(directory: Path, shards: Sequence[Shard], remedy: str) -> None:
    """Raises UserError unless a directory holds every shard with its size."""
    sizes = {}
    try:  # one listing: on a network file system it brings the sizes along
        for entry in os.scandir(directory):
            with suppress(FileNotFoundError):  # a link to nowhere
                sizes[entry.name] = entry.stat().st_size
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; {remedy}") from error
    for shard in shards:
        name, expected = shard.stored.name, shard.stored.bytes
        if name not in sizes:
            raise UserError(f"{directory / name}: the index names it, but No such file or directory; {remedy}")
        if sizes[name] != expected:
            raise UserError(f"{directory / name}: {sizes[name]} bytes, the index says {expected}; {remedy}")


class InPlace:
    """Shards read where they lie. Packed ones are unpacked into temporary files without a name, which end with us."""

    def __init__(self, directory: Path, remedy: str) -> None:
        self._directory = directory
        self._remedy = remedy

    def check(self, shards: Sequence[Shard]) -> None:
        """Every shard is there with its size, or UserError."""
        check_files(self._directory, shards, self._remedy)

    def open(self, shard: Shard) -> BinaryIO:
        """See ``Storage``."""
        path = self._directory / shard.stored.name
        try:
            if shard.packed is None:
                file: BinaryIO = path.open("rb")
                problem = file_problem(file, shard.raw)
            else:
                file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the shard is in use
                problem = unpack(path, shard, file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{tempfile.gettempdir()}: no room for the unpacked {path}; set data.cache_directory, or TMPDIR "
                    "to a larger disk"
                ) from error
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self._remedy}") from error
        if problem is not None:
            file.close()
            raise UserError(f"{path}: {problem}; {self._remedy}")
        return file


class OpenShard:
    """A shard whose rows can be read."""

    def __init__(self, file: BinaryIO, shard: Shard, name: str, remedy: str) -> None:
        """Raises UserError when the file's own header disagrees with the index."""
        self._file, self._shard, self._name, self._remedy = file, shard, name, remedy
        self._start = shard.raw.bytes - shard.rows * shard.row_bytes
        header = np.zeros(2, dtype="<u4")
        try:
            count = os.preadv(file.fileno(), [header.data], 0)
        except OSError as error:
            file.close()
            raise UserError(f"{name}: cannot be read ({error.strerror}); {remedy}") from error
        if count != header.nbytes or header.tolist() != [shard.rows, self._start]:
            file.close()
            raise UserError(f"{name}: its header disagrees with the index; {remedy}")

    def read(self, row: int, into: np.ndarray) -> None:
        """Read one row into an array of the stored type."""
        position = self._start + row * self._shard.row_bytes
        try:
            count = os.preadv(self._file.fileno(), [into.data], position)
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read any more ({error.strerror}); {self._remedy}") from error
        if count != self._shard.row_bytes:
            raise UserError(f"{self._name}: was cut while in use; {self._remedy}")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
