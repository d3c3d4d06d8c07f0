"""The node's cache with real processes, real kills and a real object store protocol."""

import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos.config.schema import Config
from mythos.data import remote
from mythos.data.cache import Cached, NodeCache
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.errors import UserError
from mythos.train.data import open_data
from tests.data.conftest import ROWS, write_data_set
from tests.data.object_store import object_store
from tests.data.test_dataset import flip_byte
from tests.require import lacking
from tests.tiny import tiny_config

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
    """The origins that were fetched, in order."""
    origins: list[str] = []
    fetch = remote.fetch

    def record(origin: str, target: Path) -> None:
        origins.append(origin)
        fetch(origin, target)

    monkeypatch.setattr(remote, "fetch", record)
    return origins


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_come_through_the_cache_each_shard_fetched_once(
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


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(
    pristine: Path, tmp_path: Path, fetched: list[str]
) -> None:
    shards = TokenDataset(pristine, "train").shards
    limit = 3 * max(shard.raw.bytes for shard in shards)
    dataset = open_cached(pristine, tmp_path / "cache", limit)
    expected = TokenDataset(pristine, "train").read(range(LENGTH))
    firsts = np.cumsum([0, *(shard.rows for shard in shards)])
    for first in firsts[:-1]:
        np.testing.assert_array_equal(dataset[int(first)], expected[first])
        assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= limit
        time.sleep(0.01)  # file times are coarse
    dataset.close()
    kept = {path.name for path in cached(tmp_path / "cache")}
    assert kept == {f"{shard.raw.xxh3_64}-{shard.raw.bytes}" for shard in shards[-3:]}
    count = len(fetched)
    open_cached(pristine, tmp_path / "cache", limit)[LENGTH - 1]
    assert len(fetched) == count
    open_cached(pristine, tmp_path / "cache", limit)[0]
    assert len(fetched) == count + 1


def test_a_stream_needs_no_more_than_the_shards_in_use_and_ahead(pristine: Path, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data", rows=1200)  # 60 shards
    dataset = open_cached(data, tmp_path / "cache", 64 * 1024)
    largest = max(shard.raw.bytes for shard in dataset.shards)
    limit = 14 * largest
    dataset = open_cached(data, tmp_path / "cache", limit)
    stream = TokenStream([Source("data", 1.0, dataset)], 1, shuffle_shards=6)
    plain = TokenStream([Source("data", 1.0, TokenDataset(data, "train"))], 1, shuffle_shards=6)
    for first in range(0, 1600, 8):
        np.testing.assert_array_equal(stream.rows(first, 8), plain.rows(first, 8))
        # Each name ends in the size: a file may go while it is counted.
        assert sum(int(path.name.split("-")[1]) for path in cached(tmp_path / "cache")) <= limit
    stream.close()


def test_a_bad_copy_is_fetched_again_and_a_bad_origin_is_named(
    data_set: Path, tmp_path: Path, fetched: list[str]
) -> None:
    expected = open_cached(data_set, tmp_path / "cache")[0]
    for damage in (lambda path: flip_byte(path, -1), lambda path: os.truncate(path, 10)):
        (copy,) = cached(tmp_path / "cache")
        damage(copy)
        np.testing.assert_array_equal(open_cached(data_set, tmp_path / "cache")[0], expected)
    assert len(fetched) == 3

    shard = data_set / "train" / "shard.00001.mds"
    flip_byte(shard, 400)
    with pytest.raises(UserError, match="damaged, its hash differs from the index; fetched 2 times") as caught:
        open_cached(data_set, tmp_path / "cache")[25]
    assert str(caught.value).startswith(f"{shard}: ")
    assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path / "cache")


def test_a_shard_that_goes_missing_after_the_start_is_named(data_set: Path, tmp_path: Path) -> None:
    dataset = open_cached(data_set, tmp_path / "cache")
    (data_set / "train" / "shard.00002.mds").unlink()
    dataset[0]
    with pytest.raises(UserError, match=r"shard\.00002\.mds: cannot be fetched \(No such file"):
        dataset.read(range(LENGTH))
    with pytest.raises(UserError, match=r"shard\.00002\.mds: the index names it"):
        open_cached(data_set, tmp_path / "cache")


@pytest.mark.parametrize("place", ["a file", "not allowed"])
def test_a_cache_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("") if place == "a file" else None
    with pytest.raises(UserError, match="data.cache_directory = .*; give a directory") as caught:
        NodeCache(path if place == "a file" else Path("/proc/mythos"), MIB)
    assert "\n" not in str(caught.value)


def test_a_failing_write_is_one_line(pristine: Path, tmp_path: Path) -> None:
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


def read_all(data: Path, cache: Path, limit_bytes: int, rounds: int, fetches: Any) -> None:
    fetch = remote.fetch

    def record(origin: str, target: Path) -> None:
        fetches.put(origin)
        fetch(origin, target)

    remote.fetch = record
    expected = TokenDataset(data, "train").read(range(LENGTH))
    for _ in range(rounds):
        dataset = open_cached(data, cache, limit_bytes)
        np.testing.assert_array_equal(dataset.read(range(LENGTH)), expected)
        dataset.close()


@pytest.mark.parametrize("room_for", [100, 2])
def test_ranks_and_runs_share_a_cache_at_the_same_time(pristine: Path, tmp_path: Path, room_for: int) -> None:
    shards = TokenDataset(pristine, "train").shards
    limit = room_for * max(shard.raw.bytes for shard in shards)
    fetches = SPAWN.Queue()
    arguments = (pristine, tmp_path / "cache", limit, 4, fetches)
    processes = [SPAWN.Process(target=read_all, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    if room_for == 100:
        origins = [fetches.get(timeout=5) for _ in shards]
        assert sorted(origins) == sorted({f"{pristine}/train/{shard.raw.name}" for shard in shards})
        assert fetches.empty(), "each shard is fetched by one of the processes"
    assert not leftovers(tmp_path / "cache")


def hang_in_a_fetch(data: Path, cache: Path, started: Any) -> None:
    def half(origin: str, target: Path) -> None:
        target.write_bytes(b"half")
        started.set()
        time.sleep(600)

    remote.fetch = half
    open_cached(data, cache)[0]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_run_holds_nobody_up(
    end: signal.Signals, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = SPAWN.Event()
    process = SPAWN.Process(target=hang_in_a_fetch, args=(pristine, tmp_path / "cache", started))
    process.start()
    try:
        assert started.wait(30)
        assert process.pid is not None
        os.kill(process.pid, end)
        if end == signal.SIGKILL:
            process.join()
        else:
            monkeypatch.setattr("mythos.data.cache.FETCH_WAIT_S", 0.5)
        assert len(leftovers(tmp_path / "cache")) == 1
        rows = open_cached(pristine, tmp_path / "cache").read(range(LENGTH))
        np.testing.assert_array_equal(rows, TokenDataset(pristine, "train").read(range(LENGTH)))
        assert len(leftovers(tmp_path / "cache")) == (end == signal.SIGSTOP), "what lives is left alone"
    finally:
        process.kill()
        process.join()
    NodeCache(tmp_path / "cache", MIB)
    assert not leftovers(tmp_path / "cache")


def test_a_held_lock_of_another_shard_does_not_matter(pristine: Path, tmp_path: Path) -> None:
    dataset = open_cached(pristine, tmp_path / "cache")
    own = int(dataset.shards[0].raw.xxh3_64, 16) % 64
    with (tmp_path / "cache" / "locks" / f"{(own + 1) % 64:02d}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset[0]


def test_a_full_disk_is_one_line_and_nothing_is_lost(pristine: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=False).returncode:
        lacking("this user may not mount a small disk")
    try:
        dataset = open_cached(pristine, disk / "cache")
        dataset[0]
        with pytest.raises(UserError, match="No space left on device; lower data.cache_gib, or make room") as caught:
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


# An object store, through the library's own downloader and boto3.


@pytest.fixture
def bucket(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    remote._clients.__dict__.clear()
    with object_store(data_set) as endpoint:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        yield "s3://bucket"


def bucket_config(bucket: str, cache: Path, **overrides: Any) -> Config:
    options = {
        "model__vocabulary_size": 4096,
        "data__directory": bucket,
        "data__cache_directory": str(cache),
        "data__cache_gib": 0.1,
    }
    return tiny_config("dense", cache, cache, **(options | overrides))


def test_an_object_store_gives_the_same_rows(bucket: str, pristine: Path, tmp_path: Path) -> None:
    data = open_data(bucket_config(bucket, tmp_path / "cache"))
    rows = data.training[0].dataset.read(range(LENGTH))
    np.testing.assert_array_equal(rows, TokenDataset(pristine, "train").read(range(LENGTH)))
    plain = open_data(tiny_config("dense", pristine, tmp_path, model__vocabulary_size=4096))
    assert data.identity == plain.identity, "the same data at another place is the same data"
    assert data.tokenizer.read_bytes() == plain.tokenizer.read_bytes()


def test_what_is_wrong_with_an_object_store_is_one_line(
    bucket: str, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES_S", (0.1,))
    config = bucket_config(bucket, tmp_path / "cache")
    dataset = open_data(config).training[0].dataset
    flip_byte(data_set / "train" / "shard.00000.mds", -1)
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00000.mds: damaged") as caught:
        dataset[0]
    (data_set / "train" / "shard.00001.mds").unlink()
    with pytest.raises(UserError, match=f"{bucket}/train/shard.00001.mds: cannot be fetched .*not found") as caught:
        dataset[25]
    assert "\n" not in str(caught.value)
    (data_set / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{bucket}/manifest.json: cannot be fetched"):
        open_data(config)
    with pytest.raises(UserError, match="unknown kind of store 'ftp'; known are alipan, azure, "):
        open_data(bucket_config("ftp://bucket", tmp_path / "cache"))
    assert not leftovers(tmp_path / "cache")


def test_a_store_that_fails_for_a_moment_is_asked_again(
    bucket: str, pristine: Path, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_data(bucket_config(bucket, tmp_path / "cache")).training[0].dataset
    shard = data_set / "train" / "shard.00000.mds"
    away = shard.rename(tmp_path / "away")
    monkeypatch.setattr(remote.time, "sleep", lambda pause_s: away.exists() and away.rename(shard))
    np.testing.assert_array_equal(dataset[0], TokenDataset(pristine, "train")[0])


def test_the_downloaders_come_without_the_rest_of_the_library() -> None:
    code = """
import sys
from mythos.data.remote import _download_module
assert "s3" in _download_module().DOWNLOADER_MAPPINGS
assert not {"transformers", "torchvision", "streaming.base.dataset"} & set(sys.modules)
assert "streaming" not in sys.modules, "no empty shell is left for a later import"
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
