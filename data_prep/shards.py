"""MDS shards of token rows, byte for byte as MDSWriter of mosaicml-streaming writes them.

MDSWriter is not used because importing `streaming` costs 5 s and 700 MiB in every process, because it numbers the
shards of a single process only, and because it writes a valid index even after an exception. A test compares the bytes
with those of MDSWriter.

A shard of ``rows`` samples is: uint32 rows | uint32 offsets[rows + 1] | JSON settings | samples.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from data_prep.parts import FREE_SPACE, Progress, read_rows, wait_until_visible
from mythos.data.format import COLUMN, INDEX_FILE, SHARD_HASH
from mythos.errors import os_errors_as_user_errors
from mythos.files import write_atomically
from mythos.readers import json_object, read_utf8

ZSTD_LEVEL = 3  # as MDSWriter
LARGEST_SHARD_MIB = 4095  # offsets are uint32


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a data set have in common."""

    encoding: str
    row_bytes: int
    size_limit: int
    compression: str | None

    def settings(self) -> dict[str, Any]:
        """The settings in every shard and in its index entry."""
        return {
            "version": 2,
            "format": "mds",
            "compression": self.compression,
            "hashes": [SHARD_HASH],
            "size_limit": self.size_limit,
            "column_names": [COLUMN],
            "column_encodings": [self.encoding],
            "column_sizes": [self.row_bytes],
        }

    @property
    def rows_a_shard(self) -> int:
        """As many as fit in the size limit, at least one."""
        header_bytes = 8 + len(json.dumps(self.settings(), sort_keys=True))
        return max((self.size_limit - header_bytes) // (self.row_bytes + 4), 1)

    def header(self, rows: int) -> bytes:
        """Everything before the samples."""
        settings = json.dumps(self.settings(), sort_keys=True).encode()
        samples_start = 4 + 4 * (rows + 1) + len(settings)
        offsets = samples_start + self.row_bytes * np.arange(rows + 1, dtype=np.uint64)
        return np.uint32(rows).tobytes() + offsets.astype("<u4").tobytes() + settings


def shard_name(number: int) -> str:
    """The file name of the uncompressed shard; a compressed one has the name of the compression appended."""
    return f"shard.{number:05}.mds"


def encode_shard(layout: ShardFormat, number: int, rows: np.ndarray) -> tuple[str, bytes, dict[str, Any]]:
    """The file name of a shard, its content and its index entry; ``rows`` has shape (rows, row_tokens)."""
    content = layout.header(len(rows)) + rows.tobytes()
    name = shard_name(number)
    entry = {"samples": len(rows), "raw_data": _describe(content, name), "zip_data": None, **layout.settings()}
    if layout.compression:
        import zstd

        name, content = f"{name}.{layout.compression}", zstd.compress(content, ZSTD_LEVEL)
        entry["zip_data"] = _describe(content, name)
    return name, content, entry


def write_index(directory: Path, entries: list[dict[str, Any]]) -> None:
    """Write DIR/index.json, which lists the shards in order."""
    write_atomically(directory / INDEX_FILE, json.dumps({"version": 2, "shards": entries}, sort_keys=True))


def deal(parts: Iterable[tuple[str, int]], rows_a_shard: int) -> Iterator[list[tuple[str, int, int]]]:
    """The (part, first row, rows) of each shard, all rows of the parts in order.

    Args:
        parts: name and rows of each.
    """
    pieces: list[tuple[str, int, int]] = []
    free = rows_a_shard
    for name, rows in parts:
        first = 0
        while first < rows:
            count = min(rows - first, free)
            pieces.append((name, first, count))
            first, free = first + count, free - count
            if not free:
                yield pieces
                pieces, free = [], rows_a_shard
    if pieces:
        yield pieces


@dataclass(frozen=True)
class WriteShard:
    """Result: none; a shard is finished when ``entry_file``, with its index entry, exists.

    ``pieces`` are (file of a part, first row, rows).
    """

    directory: str
    entry_file: str
    number: int
    layout: ShardFormat
    row_tokens: int
    dtype: str
    pieces: list[tuple[str, int, int]]
    kind: Literal["shard"] = "shard"

    def run(self, progress: Progress) -> Any:
        """Raises UserError for a full disk."""
        rows = np.concatenate([read_rows(*piece, self.row_tokens, self.dtype) for piece in self.pieces])
        name, content, entry = encode_shard(self.layout, self.number, rows)
        with os_errors_as_user_errors(self.directory, FREE_SPACE):
            write_atomically(Path(self.directory) / name, content)
            write_atomically(Path(self.entry_file), json.dumps(entry))
        progress(rows.nbytes)

    def read_entry(self) -> dict[str, Any]:
        """The index entry of the finished shard."""
        path = Path(self.entry_file)
        wait_until_visible(path.exists)
        remedy = "remove it and run again"
        return json_object(path, read_utf8(path, remedy), remedy)


def _describe(content: bytes, name: str) -> dict[str, Any]:
    return {"basename": name, "bytes": len(content), "hashes": {SHARD_HASH: xxhash.xxh3_64_hexdigest(content)}}
