"""A cache that several processes use at the same time, some of which are killed or stopped."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos.data import remote
from mythos.data.cache import NodeCache
from mythos.data.dataset import TokenDataset
from tests.data.conftest import ROWS
from tests.data.test_cache import leftovers, open_cached

LENGTH = ROWS["train"]
MIB = 2**20
SPAWN = multiprocessing.get_context("spawn")


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
def test_processes_share_a_cache_at_the_same_time(pristine: Path, tmp_path: Path, room_for: int) -> None:
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
def test_a_killed_or_stopped_run_blocks_nobody(
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
        assert len(leftovers(tmp_path / "cache")) == (end == signal.SIGSTOP), "the download of a living process is kept"
    finally:
        process.kill()
        process.join()
    NodeCache(tmp_path / "cache", MIB)
    assert not leftovers(tmp_path / "cache")
