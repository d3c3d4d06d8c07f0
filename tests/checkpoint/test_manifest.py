"""A manifest with a correct hash that somebody else has written: nothing in it is believed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.checkpoint import layout, overview
from mythos.checkpoint.manifest import FileRecord, Manifest, _digest, optimizer_file, weights_file
from mythos.checkpoint.reader import CheckpointReader
from mythos.checkpoint.tensors import write_tensors
from mythos.errors import UserError
from mythos.run.directory import MANIFEST_FILE, STATE_FILE
from tests.checkpoint.test_layout import write

W = weights_file(0)


def change(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest, and give it the right hash."""
    path = checkpoint / MANIFEST_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["xxh3_64"]
    edit(content)
    path.write_text(json.dumps(content | {"xxh3_64": _digest(content)}), encoding="utf-8")


def pieces(*found: list[float]) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["parameters"]["w"].update(pieces=list(found))


def shape(*found: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["parameters"]["w"].update(shape=list(found))


def listed(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["files"].update({name: [1, "0" * 16]})


@pytest.mark.parametrize(
    "edit",
    [
        listed("../../secret"),
        listed("/dev/zero"),
        listed("weights_00001.safetensors"),
        listed(MANIFEST_FILE),
        lambda content: content["files"].pop(W),
        lambda content: content["files"].pop(STATE_FILE),
        lambda content: content["files"][W].__setitem__(0, -1),
        lambda content: content["files"][W].__setitem__(1, "x"),
        lambda content: content.pop("parameters"),
        lambda content: content.update(step="7"),
        pieces([0, 0, 3, 3.0]),
        pieces([0, 0, 3, 3.0], [0, 3, 6, 3.0]),
        pieces([0, 1, 6, 3.0]),
        pieces([0, 0, 7, 3.0]),
        pieces([0, -1, 6, 3.0]),
        pieces([0, 0, 6, float("nan")]),
        pieces([0, 0, 6]),
        pieces([1, 0, 6, 3.0]),
        pieces(),
        shape(6, 2**61),
        shape(-2, -3),
        shape("2", 3),
        shape(7),
        shape(),
        lambda content: content["parameters"]["w"].update(matrix=[2, 2]),
        lambda content: content["parameters"]["w"].update(matrix=[0, 3]),
        lambda content: content["parameters"].update(w=None),
    ],
)
def test_a_contradictory_manifest_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = write(tmp_path / "checkpoints", 7)
    change(checkpoint, edit)
    with pytest.raises(UserError, match="manifest.json: damaged .*: restore this checkpoint") as caught:
        Manifest.load(checkpoint)
    assert len(str(caught.value).splitlines()) == 1
    for show in (overview.list_checkpoints, overview.verify_checkpoints):
        assert show(tmp_path).rows[0].state != "would be resumed"
    (problem,) = overview.verify_checkpoints(tmp_path).problems
    assert problem == str(caught.value)
    with pytest.raises(UserError, match="damaged"):
        CheckpointReader(checkpoint)


def as_link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("replace", [as_link, as_device, as_pipe])
@pytest.mark.parametrize("name", [W, STATE_FILE])
def test_only_regular_files_count(tmp_path: Path, replace: Callable[[Path], None], name: str) -> None:
    checkpoint = write(tmp_path / "checkpoints", 7)
    replace(checkpoint / name)
    for find in (layout.damaged_files, layout.incomplete_files):
        assert find(checkpoint, Manifest.load(checkpoint)) == {name: f"{checkpoint / name}: not a regular file"}


@pytest.mark.parametrize(
    ("name", "tensors", "complaint"),
    [
        (W, {"w": torch.zeros(5)}, r"w has dtype F32 and shape \[5\]"),
        (W, {"w": torch.zeros(6, dtype=torch.float64)}, r"w has dtype F64"),
        (W, {"w": torch.zeros(2, 3)}, r"shape \[2, 3\]"),
        (W, {}, "w is missing"),
        (W, {"w": torch.zeros(6), "x": torch.zeros(1)}, "x is in it"),
        (optimizer_file(0), {}, "the state of w is missing"),
        (optimizer_file(0), {"w.exp_avg": torch.zeros(7)}, "w.exp_avg has"),
        (optimizer_file(0), {"w.exp_avg": torch.zeros(6), "x.exp_avg": torch.zeros(6)}, "x.exp_avg is in it"),
        (optimizer_file(0), {"w.second_moment": torch.zeros(3)}, r"w.second_moment has .* shape \[3\]"),
        (W, None, "damaged .*header"),
    ],
)
def test_the_tensors_are_those_of_the_manifest(
    tmp_path: Path, name: str, tensors: dict[str, torch.Tensor] | None, complaint: str
) -> None:
    """Otherwise a resume would train on weights that were never saved."""
    checkpoint = write(tmp_path / "checkpoints", 7)
    if tensors is None:
        (checkpoint / name).write_bytes(b"\xff" * 100)
    else:
        write_tensors(checkpoint / name, tensors)
    record = FileRecord.of(checkpoint / name)
    change(checkpoint, lambda content: content["files"].update({name: record}))
    (problem,) = overview.verify_checkpoints(tmp_path).problems
    assert problem.startswith(f"{checkpoint / name}: ")
    assert re.search(complaint, problem)
