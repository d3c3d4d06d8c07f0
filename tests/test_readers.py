"""Files from outside: pipes, devices and directories are refused at once, and everything wrong is one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mythos.config import yaml_file
from mythos.errors import UserError, printable
from mythos.files import hash_file, open_regular, open_to_append, read_bytes
from mythos.readers import Count, Number, read_json, read_json_lines, read_yaml

OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
NUMBERS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Number])


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for its other end, and a device has no end."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (pipe(tmp_path / "pipe"), Path("/dev/zero"), tmp_path):
        for use in (open_regular, hash_file, open_to_append, lambda path: read_bytes(path, 10)):
            with pytest.raises(OSError, match="not a regular file"):
                use(path)
        with pytest.raises(UserError, match=f"{path}: not a regular file: remedy"):
            read_json(path, OBJECT, "remedy")
        with pytest.raises(UserError, match="not a regular file"):
            list(read_json_lines(path, OBJECT))
    assert read_bytes(tmp_path / "link", 1) == b"x"
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "link", follow_link=False)
    with pytest.raises(OSError, match="larger than 0 bytes"):
        read_bytes(tmp_path / "file", 0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 200_000, "recursion limit"),
        (b'{"a": ' * 200_000, "recursion limit"),
        (b"\xff", "not UTF-8"),
        (b'{"a": 1e999}', "a.*valid integer"),
        (b'{"a": NaN}', "a.*valid integer"),
        (b'{"a": ' + b"9" * 400 + b"}", "a.*less than"),
        (b'{"a": true}', "a.*valid"),
        (b"[1]", "object"),
        (b"", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.json: damaged.*{complaint}.*: remedy$") as caught:
        read_json(path, NUMBERS, "remedy")
    assert len(str(caught.value).splitlines()) == 1
    assert list(read_json_lines(path, NUMBERS)) == []


@pytest.mark.parametrize(
    "content",
    [
        "[" * 60_000,
        "a: &x [1]\nb: *x\n",
        "a: {" * 50,
        "a: 2020-99-99",
        "\x00",
        "- " * 30_000,
        "a: !!python/object:os.system {}",
        f"a: {'9' * 5000}",
        "a: 0x" + "f" * 60_000,
    ],
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="config.yaml: damaged .*: remedy$") as caught:
        read_yaml(path, yaml_file.parse, TypeAdapter(dict[str, dict[str, Count]]), "remedy")
    assert len(str(caught.value).splitlines()) == 1


def test_lines_of_another_kind_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [{"a": 1}, {"a": "1"}, [1], {"a": 10**101}, {"b": 2.5}]
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b'\xff\n{"c": 1')
    assert list(read_json_lines(path, NUMBERS)) == [{"a": 1}, {"b": 2.5}]
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n')
    assert list(read_json_lines(path, NUMBERS, last_bytes=12)) == [{"b": 2}]
    assert list(read_json_lines(tmp_path / "missing", NUMBERS)) == []


def test_control_characters_are_printed_as_escapes() -> None:
    assert printable("\x1b]0;owned\x07\x9b2J\r\u202e\udcff") == r"\x1b]0;owned\x07\x9b2J\r\u202e\udcff"
    assert printable("naïve 漢字 👩‍👧\n\tline") == "naïve 漢字 👩‍👧\n\tline"
