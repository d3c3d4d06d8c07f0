"""Preparation by two processes, on a full disk, and of sources that change meanwhile."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_prep import parts
from mythos.errors import UserError
from tests.cluster import run as run_command
from tests.data_prep.conftest import content_of, run, write_parquet
from tests.require import missing


def test_two_processes_write_the_same_bytes(several_sources: list[Path], tokenizer: Path, tmp_path: Path):
    for processes in (1, 2):
        run(several_sources, tokenizer, tmp_path / str(processes), processes=processes, packing="best_fit")
    assert content_of(tmp_path / "1") == content_of(tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.fixture
def small_disk(tmp_path: Path):
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory]).returncode:
        missing("no right to mount a tmpfs")
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(several_sources: list[Path], tokenizer: Path, small_disk: Path, tmp_path: Path, processes: int):
    with pytest.raises(UserError, match=r"disk/\.data\.partial.*: No space left on device.*: free space") as caught:
        run(several_sources, tokenizer, small_disk / "data", processes=processes)
    assert "\n" not in str(caught.value)
    assert not (small_disk / "data").exists()
    assert not list(small_disk.rglob("*.unfinished"))
    # With enough space, the finished parts are used.
    finished = {path.name for path in small_disk.rglob("parts/*.json")}
    run_command(["mount", "-o", "remount,size=64m", small_disk], limit_s=10)
    assert finished or processes == 2
    run(several_sources, tokenizer, small_disk / "data")
    run(several_sources, tokenizer, tmp_path / "undisturbed")
    assert content_of(small_disk / "data") == content_of(tmp_path / "undisturbed")


def test_a_source_that_changes_during_the_run_is_reported(
    speeches: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_parquet(tmp_path / "growing.parquet", list(speeches))
    make = parts.MakePart.run

    def make_while_it_grows(part: parts.MakePart, progress: Any) -> None:
        make(part, progress)
        source.touch()

    monkeypatch.setattr(parts.MakePart, "run", make_while_it_grows)
    with pytest.raises(UserError, match=r"growing\.parquet: was written to while it was read"):
        run([source], tokenizer, tmp_path / "data")
    monkeypatch.undo()
    run([source], tokenizer, tmp_path / "data")
