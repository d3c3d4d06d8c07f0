"""Which checkpoint counts: at every moment of a save or a removal, and after every kind of damage."""

import json
import os
from pathlib import Path

import pytest
import torch

from mythos.checkpoint import layout
from mythos.checkpoint.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    SavedParameter,
    ShardRecord,
    WrongFormat,
    optimizer_file,
    weights_file,
)
from mythos.checkpoint.tensors import write_tensors
from mythos.errors import UserError
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE, PARTIAL_SUFFIX, STATE_FILE


def write(directory: Path, step: int, value: float = 1.0) -> Path:
    """A complete checkpoint of one parameter."""
    directory.mkdir(exist_ok=True)
    partial = directory / (layout.tag(step) + PARTIAL_SUFFIX)
    partial.mkdir()
    files = {
        weights_file(0): write_tensors(partial / weights_file(0), {"w": torch.full((6,), value)}),
        optimizer_file(0): write_tensors(partial / optimizer_file(0), {"w.exp_avg": torch.ones(6)}),
    }
    (partial / STATE_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
    state = partial / STATE_FILE
    files[state.name] = FileRecord.of(state)
    parameters = {"w": SavedParameter((2, 3), (ShardRecord(0, 0, 6, 3.0),))}
    return layout.commit(partial, Manifest(step, files, parameters), lambda: None)


def names(paths: list[Path]) -> list[int]:
    return [layout.step_of(path) for path in paths]


def test_the_manifest_is_read_back(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 7)
    manifest = Manifest.load(checkpoint)
    assert manifest.parameters == {"w": SavedParameter((2, 3), (ShardRecord(0, 0, 6, 3.0),))}
    assert manifest.step == 7
    assert manifest.bytes == sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json")
    assert layout.damaged_files(checkpoint, manifest) == {}


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", 7)
    path = checkpoint / MANIFEST_FILE
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="manifest.json: "):
            Manifest.load(checkpoint)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="manifest.json: damaged .not valid JSON"):
        Manifest.load(checkpoint)


def test_latest_decides_and_newer_checkpoints_do_not_count(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path / "c", step)
    assert names(layout.resumable_checkpoints(tmp_path / "c")) == [9, 6, 3]
    (tmp_path / "c" / LATEST_FILE).write_text(layout.tag(6), encoding="utf-8")
    assert names(layout.resumable_checkpoints(tmp_path / "c")) == [6, 3]
    for text in ("", "step_", layout.tag(12), "../../etc"):
        (tmp_path / "c" / LATEST_FILE).write_text(text, encoding="utf-8")
        assert names(layout.resumable_checkpoints(tmp_path / "c")) == [9, 6, 3]
    (tmp_path / "c" / LATEST_FILE).unlink()
    assert names(layout.resumable_checkpoints(tmp_path / "c")) == [9, 6, 3]
    assert layout.resumable_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_of_repeated_steps_is_replaced(tmp_path: Path) -> None:
    for step in (3, 6):
        write(tmp_path / "c", step)
    (tmp_path / "c" / LATEST_FILE).write_text(layout.tag(3), encoding="utf-8")
    again = write(tmp_path / "c", 6, value=2.0)
    assert layout.damaged_files(again, Manifest.load(again)) == {}
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["latest", layout.tag(3), layout.tag(6)]


def test_the_newest_and_every_nth_step_are_kept(tmp_path: Path) -> None:
    for step in range(5, 45, 5):
        write(tmp_path / "c", step)
        layout.remove_old(tmp_path / "c", keep_last=2, keep_every=15)
    assert names(layout.complete_checkpoints(tmp_path / "c")) == [40, 35, 30, 15]
    assert not list((tmp_path / "c").glob(f"*{layout.REMOVED}"))


def test_an_interrupted_removal_is_completed_by_the_next_one(tmp_path: Path) -> None:
    write(tmp_path / "c", 5)
    left = tmp_path / "c" / (layout.tag(1) + layout.REMOVED)
    left.mkdir()
    (left / "weights_00000.safetensors").write_bytes(b"half")
    assert names(layout.complete_checkpoints(tmp_path / "c")) == [5]
    assert layout.partial_checkpoints(tmp_path / "c") == []
    layout.remove_old(tmp_path / "c", keep_last=1, keep_every=None)
    assert not left.exists()


def test_checkpoints_of_repeated_steps_never_count_again(tmp_path: Path) -> None:
    """The user goes back to step 6: the old checkpoints 9 to 12 must not count again when the new ones are damaged."""
    directory = tmp_path / "c"
    for step in (3, 6, 9, 11, 12):
        write(directory, step)
    (directory / LATEST_FILE).write_text(layout.tag(6), encoding="utf-8")
    chosen = layout.resumable_checkpoints(directory)[0]
    moved = layout.make_current(directory, chosen)
    assert sorted(path.name for path in moved) == [layout.tag(9), layout.tag(11), layout.tag(12)]
    assert all(path.parent.name == layout.SET_ASIDE for path in moved)
    write(directory, 9, value=2.0)
    write(directory, 12, value=2.0)
    layout.remove_old(directory, keep_last=2, keep_every=None)
    assert names(layout.resumable_checkpoints(directory)) == [12, 9]

    # The named one is damaged: `latest` names the one before it before a newer one could count.
    chosen = layout.resumable_checkpoints(directory)[1]
    assert [path.name for path in layout.make_current(directory, chosen)] == [f"{layout.tag(12)}.2"]
    assert layout.latest(directory) == chosen


def test_a_checkpoint_of_another_format_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(tmp_path / "c", 3)
    monkeypatch.setattr("mythos.checkpoint.manifest.FORMAT_VERSION", FORMAT_VERSION + 1)
    with pytest.raises(WrongFormat, match="use the Mythos that wrote it"):
        Manifest.load(checkpoint)


def test_a_commit_that_stops_anywhere_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of its renames: either the old or the new checkpoint counts, and it is valid."""

    class Stopped(Exception):
        pass

    rename, replace = os.rename, os.replace
    for moment in range(10):
        directory = tmp_path / str(moment)
        write(directory, 3)
        write(directory, 6, value=2.0)
        (directory / LATEST_FILE).write_text(layout.tag(3), encoding="utf-8")
        calls = 0

        def counted(function, *arguments):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > moment:  # noqa: B023
                raise Stopped
            return function(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *a: counted(rename, *a))
            patch.setattr(os, "replace", lambda *a: counted(replace, *a))
            try:
                write(directory, 6, value=3.0)
            except Stopped:
                done = False
            else:
                done = True
        newest = layout.resumable_checkpoints(directory)[0]
        assert layout.damaged_files(newest, Manifest.load(newest)) == {}
        assert layout.step_of(newest) == (6 if done else 3)
        if done:
            return
    raise AssertionError("the commit never finished")


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    for content in ("a", "b"):
        place = tmp_path / layout.tag(5)
        place.mkdir()
        (place / "x").write_text(content, encoding="utf-8")
        layout.set_aside(place)
    aside = tmp_path / layout.SET_ASIDE
    assert (aside / layout.tag(5) / "x").read_text(encoding="utf-8") == "a"
    assert (aside / f"{layout.tag(5)}.2" / "x").read_text(encoding="utf-8") == "b"


def test_a_commit_is_undone_if_latest_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt can then use its space, and the checkpoint that it replaced is back."""
    directory = tmp_path / "c"
    for step in (3, 6):
        write(directory, step)

    def full(path: Path, text: str) -> None:
        if path.name == LATEST_FILE:
            raise OSError(28, "No space left on device")
        write_atomically(path, text)

    write_atomically = layout.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(layout, "write_atomically", full)
        for step in (6, 9):
            with pytest.raises(OSError, match="No space left"):
                write(directory, step, value=2.0)
    assert names(layout.complete_checkpoints(directory)) == [6, 3]
    assert [path.name for path in layout.partial_checkpoints(directory)] == [
        f"{layout.tag(6)}.partial",
        f"{layout.tag(9)}.partial",
    ]
    newest = layout.resumable_checkpoints(directory)[0]
    assert layout.damaged_files(newest, Manifest.load(newest)) == {}
