"""Checking one shard against its index entry: an item of work of `mythos data verify`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
import zstd

from data_prep.shards import ShardFormat
from mythos.data.format import SHARD_HASH
from mythos.files import read_bytes


@dataclass(frozen=True)
class VerifyShard:
    """Result: what is wrong with the shard, or None. ``entry`` is its entry in the index."""

    directory: str
    entry: dict[str, Any]
    vocabulary_size: int
    kind: Literal["verify"] = "verify"

    @property
    def path(self) -> Path:
        """The file of the shard."""
        return Path(self.directory) / stored(self.entry)["basename"]

    def run(self, progress: Callable[[int], None]) -> Any:
        """Read the whole shard."""
        try:
            content = read_bytes(self.path, stored(self.entry)["bytes"])
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        progress(len(content))
        problem = _problem(content, stored(self.entry))
        if not problem and self.entry["zip_data"]:
            try:
                content = zstd.decompress(content)
            except zstd.Error as error:
                return f"cannot be decompressed ({error})"
            problem = _problem(content, self.entry["raw_data"])
        return problem or self._content_problem(content)

    def _content_problem(self, content: bytes) -> str | None:
        rows = self.entry["samples"]
        encoding, row_bytes = self.entry["column_encodings"][0], self.entry["column_sizes"][0]
        layout = ShardFormat(encoding, row_bytes, self.entry["size_limit"], self.entry["compression"])
        header = layout.header(rows)
        if not content.startswith(header) or len(content) != len(header) + rows * row_bytes:
            return f"does not hold the {rows} rows of its index entry"
        dtype = np.dtype(encoding.split(":")[1]).newbyteorder("<")
        tokens = np.frombuffer(content, dtype=dtype, offset=len(header)).reshape(rows, -1)
        too_large = np.flatnonzero((tokens >= self.vocabulary_size).any(axis=1))
        if too_large.size:
            row = int(too_large[0])
            return f"row {row} has token id {tokens[row].max()}, the vocabulary has {self.vocabulary_size}"
        return None


def stored(entry: dict[str, Any]) -> dict[str, Any]:
    """The part of an index entry that describes the stored file, which may be compressed."""
    described: dict[str, Any] = entry["zip_data"] or entry["raw_data"]
    return described


def _problem(content: bytes, description: dict[str, Any]) -> str | None:
    if len(content) != description["bytes"]:
        return f"{len(content)} bytes, the index says {description['bytes']}"
    if xxhash.xxh3_64_hexdigest(content) != description["hashes"][SHARD_HASH]:
        return "damaged, its hash differs from the index"
    return None
