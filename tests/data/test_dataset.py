import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos.data.dataset import TokenDataset
from mythos.errors import UserError
from tests.data.conftest import ROWS, SEQUENCE_LENGTH, write_data_set

LENGTH = ROWS["train"]


@pytest.mark.parametrize("vocabulary_size", [4096, 70000])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_equal_those_of_the_streaming_library(tmp_path: Path, vocabulary_size: int, split: str):
    from streaming import LocalDataset

    directory = write_data_set(tmp_path / "data", vocabulary_size)
    ours, theirs = TokenDataset(directory, split), LocalDataset(str(directory), split)
    assert len(ours) == len(theirs) == ROWS[split]
    assert len(list((directory / "train").glob("*.mds"))) >= 5
    for index in range(len(ours)):
        row = ours[index]
        assert row.dtype == np.int64
        assert row.shape == (SEQUENCE_LENGTH + 1,)
        np.testing.assert_array_equal(row, theirs[index]["tokens"])


def test_compressed_shards_give_the_same_rows_and_the_data_directory_is_unchanged(pristine: Path, tmp_path: Path):
    packed = write_data_set(tmp_path / "data", compression="zstd:3")
    before = sorted(packed.rglob("*"))
    ours, expected = TokenDataset(packed, "train"), TokenDataset(pristine, "train")
    np.testing.assert_array_equal(ours.read(range(LENGTH)), expected.read(range(LENGTH)))
    assert sorted(packed.rglob("*")) == before
    flip_byte(packed / "train" / "shard.00001.mds.zstd", 30)
    with pytest.raises(UserError, match=r"shard\.00001\.mds\.zstd: damaged"):
        TokenDataset(packed, "train").read(range(LENGTH))


def test_only_a_bounded_number_of_files_is_open(pristine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mythos.data.dataset.KEEP_OPEN", 2)
    dataset = TokenDataset(pristine, "train")
    files = len(os.listdir("/proc/self/fd"))
    rows = dataset.read(range(LENGTH))
    assert len(os.listdir("/proc/self/fd")) == files + 2
    np.testing.assert_array_equal(rows, TokenDataset(pristine, "train").read(range(LENGTH)))
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) <= files + 2, "only those of the second data set are open"


def test_rows_may_be_read_in_any_order_and_changed(pristine: Path):
    forward, backward = TokenDataset(pristine, "train"), TokenDataset(pristine, "train")
    rows = [forward[index] for index in range(LENGTH)]
    for index in reversed(range(LENGTH)):
        row = backward[index]
        np.testing.assert_array_equal(row, rows[index])
        row[:] = -1  # a copy: the next read returns the data
        np.testing.assert_array_equal(backward[index], rows[index])


@pytest.mark.parametrize("index", [-1, LENGTH])
def test_a_row_outside_the_data_set_is_an_index_error(pristine: Path, index: int):
    with pytest.raises(IndexError, match=str(index)):
        TokenDataset(pristine, "train")[index]


def test_unknown_split(pristine: Path):
    with pytest.raises(UserError, match="'test'"):
        TokenDataset(pristine, "test")


def test_the_reader_imports_neither_torch_nor_streaming():
    code = (
        "import sys, mythos.data.stream, mythos.data.cache; sys.exit(bool({'torch', 'streaming'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 200, -1])
def test_flipped_byte_is_found_when_the_shard_is_first_used(data_set: Path, position: int):
    shard = data_set / "train" / "shard.00002.mds"
    flip_byte(shard, position)
    dataset = TokenDataset(data_set, "train")
    dataset[0]  # the other shards can still be read
    rows_before = sum(entry["samples"] for entry in read_index(data_set)["shards"][:2])
    with pytest.raises(UserError, match="hash") as caught:
        dataset[rows_before]
    assert str(shard) in str(caught.value)
    assert "mythos data prepare" in str(caught.value)
    dataset[rows_before - 1]
    with pytest.raises(UserError, match="hash"):
        dataset[rows_before]  # it is refused again


def test_missing_shard_is_found_at_construction(data_set: Path):
    shard = data_set / "train" / "shard.00003.mds"
    shard.unlink()
    with pytest.raises(UserError, match="missing, but listed in the index") as caught:
        TokenDataset(data_set, "train")
    assert str(shard) in str(caught.value)


def test_truncated_shard_is_found_at_construction(data_set: Path):
    shard = data_set / "train" / "shard.00001.mds"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{size - 1} bytes, the index says {size}") as caught:
        TokenDataset(data_set, "train")
    assert str(shard) in str(caught.value)


def test_shard_truncated_while_in_use_is_an_error_and_not_a_signal(data_set: Path):
    dataset = TokenDataset(data_set, "train")
    dataset[0]
    os.truncate(data_set / "train" / "shard.00000.mds", 300)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: was truncated while in use"):
        dataset[15]


def test_shard_truncated_after_construction_is_found_when_it_is_opened(data_set: Path):
    dataset = TokenDataset(data_set, "train")
    shard = data_set / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard\.00000\.mds: 100 bytes"):
        dataset[0]


def read_index(data_set: Path) -> dict[str, Any]:
    return json.loads((data_set / "train" / "index.json").read_text(encoding="utf-8"))


def set_in_shard(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["shards"][1].__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (set_in_shard("column_encodings", ["ndarray:uint32:16"]), "column_encodings"),
        (set_in_shard("column_encodings", ["ndarray:uint16"]), "column_encodings"),
        (set_in_shard("column_sizes", [None]), "column_sizes"),
        (set_in_shard("column_names", ["text"]), "column_names"),
        (set_in_shard("compression", "gz"), "compression"),
        (set_in_shard("compression", "zstd"), "damaged entry"),
        (lambda index: index["shards"][1]["raw_data"].update(basename="../../etc/passwd"), "basename"),
        (set_in_shard("format", "jsonl"), "format"),
        (set_in_shard("raw_data", None), "raw_data"),
        (lambda index: index["shards"][1]["raw_data"]["hashes"].clear(), "xxh3_64"),
        (lambda index: index["shards"][1].pop("samples"), "samples"),
        (lambda index: index["shards"].__setitem__(0, None), r"shards\.0: "),
        (lambda index: index.update(version=1), "version 2"),
        (lambda index: index.update(shards={}), "shards: "),
    ],
)
def test_foreign_index_is_refused(data_set: Path, damage: Callable[[dict[str, Any]], object], complaint: str):
    index = read_index(data_set)
    damage(index)
    path = data_set / "train" / "index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as caught:
        TokenDataset(data_set, "train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_index(data_set: Path):
    path = data_set / "train" / "index.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        TokenDataset(data_set, "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("shards_kept", [0, 2])
def test_index_with_fewer_rows_than_the_manifest(data_set: Path, shards_kept: int):
    index = read_index(data_set)
    index["shards"] = index["shards"][:shards_kept]
    (data_set / "train" / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=f"the manifest has {LENGTH}") as caught:
        TokenDataset(data_set, "train")
    assert str(data_set / "train") in str(caught.value)


def test_index_whose_row_counts_moved_between_shards(data_set: Path):
    index = read_index(data_set)
    index["shards"][0]["samples"] += 1
    index["shards"][1]["samples"] -= 1
    (data_set / "train" / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"shard\.00000\.mds: its header"):
        TokenDataset(data_set, "train")[0]


@pytest.mark.parametrize("name", ["manifest.json", "train/index.json"])
def test_missing_file(data_set: Path, name: str):
    (data_set / name).unlink()
    with pytest.raises(UserError, match="no such file") as caught:
        TokenDataset(data_set, "train")
    assert str(data_set / name) in str(caught.value)
