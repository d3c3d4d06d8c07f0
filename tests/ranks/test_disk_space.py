"""The free space for checkpoints is checked before the first step, on the disk that they are written to."""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.ranks import preflight
from tests.faults.damage import small_disk
from tests.require import missing
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import failure


def test_a_full_disk_is_reported_before_the_first_step(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2)
    for error in two_ranks.run(failure_with_bytes_free, config, 1 << 18):
        assert re.search(r"0.000244 GiB free, the next 2 checkpoints need about 0.000\d+ GiB: free space", error)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def failure_with_bytes_free(config: Config, free: int) -> str:
    original = shutil.disk_usage
    shutil.disk_usage = lambda path: original(path)._replace(free=free)  # type: ignore[assignment]
    try:
        return failure(config)
    finally:
        shutil.disk_usage = original


def test_the_free_space_is_that_of_the_disk_of_the_checkpoints(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("dense", tiny_data, tmp_path / "run", model__layers=10)
    (tmp_path / "run").mkdir()
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.symlink_to(tmp_path / "disk")
    with ExitStack() as cleanup:
        try:
            cleanup.enter_context(small_disk(tmp_path / "disk", 1))
        except OSError as error:
            missing(str(error))
        with pytest.raises(UserError, match=f"GiB free on the disk of {tmp_path}/disk, the next 2 checkpoints need"):
            preflight._check_space(config)
    checkpoints.unlink()
    checkpoints.mkdir()
    preflight._check_space(config)
