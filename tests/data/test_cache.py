"""The node's cache, with real processes and real kills."""

import fcntl
import multiprocessing
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mythos.data import remote
from mythos.data.cache import Cached, NodeCache
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.errors import UserError
from tests.data.conftest import ROWS, write_data_set
from tests.data.test_dataset import flip_byte
from tests.require import missing

LENGTH = ROWS["train"]
MIB = 2**20
SPAWN = multiprocessing.get_context("spawn")


def open_cached(data: Path, cache: Path, limit_bytes: int = MIB) -> TokenDataset:
    storage = Cached(NodeCache(cache, limit_bytes), f"{data}/train", "copy it again")
    return TokenDataset(data, "train", storage)


def cached(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def leftovers(cache: Path) -> list[Path]:
    return sorted((cache / "partial").iterdir())


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were fetched, in order."""
    origins: list[str] = []
    fetch = remote.fetch

    def record(origin: str, target: Path) -> None:
        origins.append(origin)
        fetch(origin, target)

    monkeypatch.setattr(remote, "fetch", record)
    return origins


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_read_through_the_cache_are_right_and_each_shard_is_fetched_once(
    compression: str | None, pristine: Path, tmp_path: Path, fetched: list[str]
) -> None:
    data = write_data_set(tmp_path / "data", compression=compression)
    before = sorted(data.rglob("*"))
    expected = TokenDataset(pristine, "train").read(range(LENGTH))
    for _ in range(2):
        np.testing.assert_array_equal(open_cached(data, tmp_path / "cache").read(range(LENGTH)), expected)
    assert sorted(data.rglob("*")) == before
    assert len(fetched) == len(set(fetched)) == len(cached(tmp_path / "cache")) >= 5
    assert not leftovers(tmp_path / "cache")


def test_the_cache_stays_within_its_limit_and_keeps_the_shards_used_last(
    pristine: Path, tmp_path: Path, fetched: list[str]
) -> None:
    shards = TokenDataset(pristine, "train").shards
    limit = 3 * max(shard.raw.bytes for shard in shards)
    dataset = open_cached(pristine, tmp_path / "cache", limit)
    expected = TokenDataset(pristine, "train").read(range(LENGTH))
    firsts = np.cumsum([0, *(shard.rows for shard in shards)])
    for first in firsts[:-1]:
        np.testing.assert_array_equal(dataset[int(first)], expected[first])
        dataset.close()
        assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= limit
        time.sleep(0.01)  # file times are coarse
    kept = {path.name for path in cached(tmp_path / "cache")}
    assert kept == {f"{shard.raw.xxh3_64}-{shard.raw.bytes}" for shard in shards[-3:]}
    count = len(fetched)
    open_cached(pristine, tmp_path / "cache", limit)[LENGTH - 1]
    assert len(fetched) == count
    open_cached(pristine, tmp_path / "cache", limit)[0]
    assert len(fetched) == count + 1


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027])
def test_all_that_is_in_the_cache_has_the_modes_of_the_umask(
    umask: int, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = remote.fetch
    partial_modes = []

    def watched(origin: str, target: Path) -> None:
        partial_modes.append(target.parent.stat().st_mode & 0o777)
        fetch(origin, target)

    monkeypatch.setattr(remote, "fetch", watched)
    before = os.umask(umask)
    try:
        open_cached(pristine, tmp_path / "cache")[0]
    finally:
        os.umask(before)
    assert partial_modes == [0o777 & ~umask], "processes of the group can remove it after a kill"
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_open_shards_stay_in_the_cache(pristine: Path, tmp_path: Path) -> None:
    """A shard that is removed while it is open still occupies the disk, without being counted."""
    reader = open_cached(pristine, tmp_path / "cache", 64 * 1024)
    limit = 3 * max(shard.raw.bytes for shard in reader.shards)
    reader = open_cached(pristine, tmp_path / "cache", limit)
    reader[0]
    (first,) = cached(tmp_path / "cache")
    other = open_cached(pristine, tmp_path / "cache", limit)
    rows = len(reader) // len(reader.shards)
    for number in range(1, len(reader.shards)):
        time.sleep(0.01)
        other[number * rows]
        other.close()
        assert first.exists()
        assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= limit
    reader.close()
    for number in range(1, len(reader.shards)):
        other[number * rows]
        other.close()
    assert not first.exists(), "once closed, it is the least recently opened one"


def test_foreign_files_are_kept(pristine: Path, tmp_path: Path) -> None:
    for name in ("shards/thesis.bin", "partial/mine/notes.txt"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True)
        (tmp_path / "cache" / name).write_text("years of work", encoding="utf-8")
    dataset = open_cached(pristine, tmp_path / "cache", 1)
    for row in range(0, LENGTH, 10):
        dataset[row]
        dataset.close()
    for name in ("shards/thesis.bin", "partial/mine/notes.txt"):
        assert (tmp_path / "cache" / name).read_text(encoding="utf-8") == "years of work"


def test_a_stopped_process_that_frees_space_blocks_nobody(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos.data.cache.ROOM_WAIT_S", 0.3)
    NodeCache(tmp_path / "cache", MIB)
    with (tmp_path / "cache" / "locks" / "room").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_cached(pristine, tmp_path / "cache")[0]


def test_a_stream_needs_no_more_space_than_the_shards_in_use_and_ahead(pristine: Path, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data", rows=1200)  # 60 shards
    dataset = open_cached(data, tmp_path / "cache", 64 * 1024)
    largest = max(shard.raw.bytes for shard in dataset.shards)
    limit = 14 * largest
    dataset = open_cached(data, tmp_path / "cache", limit)
    stream = TokenStream([Source("data", 1.0, dataset)], 1, shuffle_shards=6)
    plain = TokenStream([Source("data", 1.0, TokenDataset(data, "train"))], 1, shuffle_shards=6)
    for first in range(0, 1600, 8):
        np.testing.assert_array_equal(stream.rows(first, 8), plain.rows(first, 8))
        assert bytes_at_one_moment(tmp_path / "cache") <= limit
    stream.close()


def bytes_at_one_moment(cache: Path) -> int:
    """The total of the sizes in the names, from two equal listings: files may change while a directory is listed."""
    before, now = None, cached(cache)
    while now != before:
        before, now = now, cached(cache)
    return sum(int(path.name.split("-")[1]) for path in now)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_reported(
    data_set: Path, tmp_path: Path, fetched: list[str]
) -> None:
    expected = open_cached(data_set, tmp_path / "cache")[0]
    for damage in (lambda path: flip_byte(path, -1), lambda path: os.truncate(path, 10)):
        (copy,) = cached(tmp_path / "cache")
        damage(copy)
        np.testing.assert_array_equal(open_cached(data_set, tmp_path / "cache")[0], expected)
    # A stream of an earlier test may still be fetching.
    assert len([origin for origin in fetched if origin.startswith(str(data_set))]) == 3

    shard = data_set / "train" / "shard.00001.mds"
    flip_byte(shard, 400)
    with pytest.raises(UserError, match="damaged, its hash differs from the index; fetched 2 times") as caught:
        open_cached(data_set, tmp_path / "cache")[25]
    assert str(caught.value).startswith(f"{shard}: ")
    assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path / "cache")


def test_a_shard_that_is_removed_after_the_start_is_reported(data_set: Path, tmp_path: Path) -> None:
    dataset = open_cached(data_set, tmp_path / "cache")
    (data_set / "train" / "shard.00002.mds").unlink()
    dataset[0]
    with pytest.raises(UserError, match=r"shard\.00002\.mds: No such file or directory: check"):
        dataset.read(range(LENGTH))
    with pytest.raises(UserError, match=r"shard\.00002\.mds: missing, but listed in the index"):
        open_cached(data_set, tmp_path / "cache")


@pytest.mark.parametrize("place", ["a file", "not allowed"])
def test_a_cache_that_cannot_be_written_is_reported(place: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("", encoding="utf-8") if place == "a file" else None
    with pytest.raises(UserError, match="data.cache_directory = .*: choose a writable directory") as caught:
        NodeCache(path if place == "a file" else Path("/proc/mythos"), MIB)
    assert "\n" not in str(caught.value)


def test_a_failing_write_is_reported_in_one_line(pristine: Path, tmp_path: Path) -> None:
    dataset = open_cached(pristine, tmp_path / "cache")
    shard = dataset.shards[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard.raw.bytes // 2, hard))
    try:
        with pytest.raises(UserError, match="data.cache_directory = "):
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not leftovers(tmp_path / "cache")
    dataset[0]


def test_a_locked_fetch_of_another_shard_does_not_block(pristine: Path, tmp_path: Path) -> None:
    dataset = open_cached(pristine, tmp_path / "cache")
    own = int(dataset.shards[0].raw.xxh3_64, 16) % 64
    with (tmp_path / "cache" / "locks" / f"{(own + 1) % 64:02d}").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset[0]


def test_a_full_disk_is_reported_in_one_line_and_reading_continues_later(pristine: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=False).returncode:
        missing("this user may not mount a small disk")
    try:
        dataset = open_cached(pristine, disk / "cache")
        dataset[0]
        with pytest.raises(UserError, match="No space left on device.*: lower data.cache_gib, or free space") as caught:
            dataset.read(range(LENGTH))
        assert str(disk / "cache") in str(caught.value)
        dataset.close()
        assert not leftovers(disk / "cache")
        for copy in cached(disk / "cache"):
            copy.unlink()
        dataset[0]
        dataset.close()
    finally:
        subprocess.run(["umount", disk], check=True)
