import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from mythos.data.format import SPLITS, Manifest, fingerprint, token_dtype
from mythos.errors import UserError
from mythos.files import write_atomically


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_uint16_is_used_up_to_its_largest_vocabulary():
    assert token_dtype(65536) == "uint16"
    assert token_dtype(65537) == "uint32"


def test_a_saved_manifest_loads_as_it_was(pristine: Path, tmp_path: Path):
    manifest = Manifest.load(pristine)
    assert manifest.encoding == "ndarray:uint16:16"
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert os.listdir(tmp_path) == ["manifest.json"]  # no temporary file is left


def test_bytes_per_token_includes_the_dropped_tail(pristine: Path):
    counts = Manifest.load(pristine).splits["validation"]
    assert counts.bytes_per_token == 999 / (7 * 16 + 5)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not valid JSON"),
        ('{"format_version": 2', "not valid JSON"),
        ("[1]", "should be an object"),
        ('{"format_version": 1}', "format_version is 1"),
        ("{}", "format_version is None"),
        ('{"format_version": 2}', "sequence_length"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_damaged_manifest_is_reported_in_one_line(data_set: Path, content: str | bytes, complaint: str):
    path = data_set / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        Manifest.load(data_set)
    message = str(caught.value)
    assert str(path) in message
    assert "mythos data prepare" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("sequence_length", "256"), ("vocabulary_size", 4096.5), ("surprise", 1), ("splits", {}), ("sources", [{}])],
)
def test_manifest_with_a_wrong_field_is_refused(data_set: Path, name: str, value: object):
    edit_manifest(data_set, **{name: value})
    with pytest.raises(UserError, match=name):
        Manifest.load(data_set)


def test_missing_manifest(data_set: Path):
    (data_set / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        Manifest.load(data_set)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_fingerprint_does_not_depend_on_the_path_or_the_sources(pristine: Path, tmp_path: Path):
    moved = Path(shutil.copytree(pristine, tmp_path / "moved"))
    edit_manifest(moved, sources=[])
    assert fingerprint(moved) == fingerprint(pristine)


@pytest.mark.parametrize("change", ["tokenizer_sha256", "sequence_length", "vocabulary_size", *SPLITS])
def test_fingerprint_changes_with_the_data(pristine: Path, data_set: Path, change: str):
    if change in SPLITS:
        index = data_set / change / "index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        content["shards"][0]["raw_data"]["hashes"]["xxh3_64"] = "0" * 16
        index.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
    else:
        edit_manifest(data_set, **{change: "f" * 64 if change == "tokenizer_sha256" else 17})
    assert fingerprint(data_set) != fingerprint(pristine)


def test_fingerprint_of_an_incomplete_data_set_is_refused(data_set: Path):
    (data_set / "validation" / "index.json").unlink()
    with pytest.raises(UserError, match=r"validation/index\.json"):
        fingerprint(data_set)


def test_manifest_cannot_be_changed(pristine: Path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Manifest.load(pristine).sequence_length = 1  # type: ignore[misc]
