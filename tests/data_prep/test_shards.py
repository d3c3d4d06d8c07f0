"""Shards compared with those of mosaicml-streaming, which defines the format."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import ShardFormat, encode_shard, write_index
from mythos.data.format import COLUMN, SHARD_HASH
from tests.data_prep.conftest import content_of


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(("dtype", "row_tokens", "rows"), [("uint16", 17, 200), ("uint32", 64, 31), ("uint16", 600, 5)])
def test_every_byte_is_the_same_as_from_the_library(
    tmp_path: Path, compression: str | None, dtype: str, row_tokens: int, rows: int
):
    from streaming import MDSWriter

    encoding, size_limit = f"ndarray:{dtype}:{row_tokens}", 2000
    data = np.random.default_rng(0).integers(60_000, size=(rows, row_tokens)).astype(dtype)
    writer = MDSWriter(
        columns={COLUMN: encoding},
        out=str(tmp_path / "library"),
        hashes=[SHARD_HASH],
        size_limit=size_limit,
        compression=compression,
    )
    for row in data:
        writer.write({COLUMN: row})
    writer.finish()

    ours = tmp_path / "ours"
    ours.mkdir()
    layout = ShardFormat(encoding, data[0].nbytes, size_limit, compression)
    entries = []
    for number, first in enumerate(range(0, rows, layout.rows_a_shard)):
        name, content, entry = encode_shard(layout, number, data[first : first + layout.rows_a_shard])
        (ours / name).write_bytes(content)
        entries.append(entry)
    write_index(ours, entries)
    assert len(entries) > 1
    assert content_of(ours) == content_of(tmp_path / "library")
