"""File systems that cannot do all that a local disk can."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mythos import files
from mythos.checkpoint import layout
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.run.directory import RunDirectory
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_training


def run_without_fsync(config: Config, kind: int) -> tuple[int, str]:
    """A training run on a file system that refuses to flush one kind of file; its exit code and error."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_IFMT(os.fstat(descriptor).st_mode) == kind:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        patch.setattr(files, "_warned_of", [])
        try:
            return run_training(config), ""
        except UserError as error:
            return error.exit_code, str(error)


def tiny_run(data: Path, directory: Path) -> Config:
    return tiny_config(
        "dense", data, directory, train__steps=6, checkpoint__every=2, checkpoint__keep_last=3,
        checkpoint__max_failures=1, optim__cooldown="constant",
    )  # fmt: skip


def test_directories_that_cannot_be_flushed_do_not_stop_saves(
    one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    assert one_rank.run(run_without_fsync, tiny_run(tiny_data, run.path), stat.S_IFDIR) == [(0, "")]
    assert [path.name for path in layout.complete_checkpoints(run.checkpoints)] == [
        layout.tag(step) for step in (6, 4, 2)
    ]
    log = run.log(0).read_text(encoding="utf-8")
    assert log.count("this file system does not flush directories (Invalid argument)") == 1, "not once for each save"
    assert "not saved" not in log


def test_files_that_cannot_be_flushed_stop_the_run(one_rank: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    ((code, message),) = one_rank.run(run_without_fsync, tiny_run(tiny_data, tmp_path / "run"), stat.S_IFREG)
    # Already the run's configuration cannot be written.
    assert code == 2
    assert "Invalid argument" in message
