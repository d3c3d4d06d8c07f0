"""`mythos data verify` finds every kind of damage and reports every damaged file."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstd

from mythos.data.dataset import TokenDataset
from mythos.errors import UserError
from tests.cluster import run as run_command
from tests.data_prep.conftest import run
from tests.data_prep.test_commands import command

SHARD, OTHER = "train/shard.00001.mds", "validation/shard.00000.mds"


@pytest.fixture(scope="module", params=[None, "zstd"])
def valid(
    request: pytest.FixtureRequest,
    several_sources: list[Path],
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """In several shards; must not be changed."""
    output = tmp_path_factory.mktemp("valid") / "data"
    run(several_sources, tokenizer, output, shard_size_mib=1, compression=request.param)
    return output


@pytest.fixture
def data(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "data"))


def file_of(data: Path, shard: str) -> Path:
    return next((data / shard).parent.glob(Path(shard).name + "*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def verify(data: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The findings; none if the data set is valid."""
    exit_code = command("verify", data, "--processes", 1)
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert exit_code == (2 if lines else 0)
    assert ("valid" in printed.out) == (not lines)
    assert all(str(data) in line and "prepare it again" in line for line in lines)
    return lines


def test_valid(valid: Path, capsys: pytest.CaptureFixture[str]):
    assert len(list((valid / "train").glob("shard.*"))) >= 3
    assert verify(valid, capsys) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "damaged, its hash differs from the index"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes, the index says"),
        (lambda path: path.unlink(), "missing, but listed in the index"),
        (lambda path: path.unlink() or path.symlink_to("nowhere"), "missing, but listed in the index"),
    ],
    ids=["flipped", "cut", "gone", "a link to nowhere"],
)
def test_each_damaged_shard_is_reported_once(
    data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
):
    bad = [file_of(data, SHARD), file_of(data, OTHER)]
    for path in bad:
        damage(path)
    lines = verify(data, capsys)
    assert len(lines) == 2
    for path in bad:
        assert sum(f"{path}: " in line and message in line for line in lines) == 1


def test_an_id_outside_the_vocabulary(data: Path, capsys: pytest.CaptureFixture[str]):
    """A shard with a bad id but a correct hash and index entry."""
    path, index = file_of(data, SHARD), data / "train/index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    entry = entries["shards"][1]
    content = bytearray(zstd.decompress(path.read_bytes()) if entry["zip_data"] else path.read_bytes())
    content[-130:] = np.full(65, 512, dtype=np.uint16).tobytes()
    entry["raw_data"]["hashes"]["xxh3_64"] = xxhash.xxh3_64_hexdigest(bytes(content))
    stored = bytes(content)
    if entry["zip_data"]:
        stored = zstd.compress(stored)
        entry["zip_data"] |= {"bytes": len(stored), "hashes": {"xxh3_64": xxhash.xxh3_64_hexdigest(stored)}}
    path.write_bytes(stored)
    index.write_text(json.dumps(entries), encoding="utf-8")
    (line,) = verify(data, capsys)
    assert f"{path}: row {entry['samples'] - 1} has token id 512, the vocabulary has 512" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | {"samples": -5},
        lambda entry: entry | {"samples": 10**13},
        lambda entry: entry | {"size_limit": None},
        lambda entry: entry | {"raw_data": entry["raw_data"] | {"hashes": {"xxh3_64": "g" * 16}}},
    ],
)
def test_a_damaged_entry_of_an_index(
    data: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], dict[str, Any]]
):
    index = data / "train/index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    entries["shards"][1] = change(entries["shards"][1])
    index.write_text(json.dumps(entries), encoding="utf-8")
    (line,) = verify(data, capsys)
    assert re.search(rf"{index}: (shard 1: damaged entry|damaged \(shards\.1\.)", line)
    if entries["shards"][1]["size_limit"] is not None:  # the reader does not need this field
        with pytest.raises(UserError, match=r"train/index.json: (shard 1: damaged entry|damaged \(shards\.1\.)"):
            TokenDataset(data, "train")


def test_counts_against_the_manifest(data: Path, capsys: pytest.CaptureFixture[str]):
    index = data / "train/index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    entries["shards"].pop()
    index.write_text(json.dumps(entries), encoding="utf-8")
    counts, stray = verify(data, capsys)
    assert f"{index}: " in counts
    assert "the manifest has" in counts
    assert "not listed in the index" in stray


def test_a_truncated_index_and_another_tokenizer(data: Path, capsys: pytest.CaptureFixture[str]):
    index = data / "validation/index.json"
    index.write_text(index.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    first, second = verify(data, capsys)
    assert f"{index}: damaged" in first
    assert f"{tokenizer}: not the tokenizer that made the ids" in second


def test_in_two_processes_and_without_a_manifest(data: Path):
    words = [sys.executable, "-m", "launch.cli", "data", "verify", data, "--processes", "2"]
    flip(file_of(data, SHARD))
    done = run_command(words, limit_s=150)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    (data / "manifest.json").unlink()
    done = run_command(words, limit_s=150)
    assert done.returncode == 2
    assert "manifest.json: no such file" in done.stderr
    assert done.stderr.count("\n") == 1
