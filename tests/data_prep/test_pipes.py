"""A pipe in the place of a file would wait for its other end for ever."""

import os
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from mythos.data.dataset import TokenDataset
from mythos.errors import UserError


def as_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "name", ["manifest.json", "train/index.json", "train/shard.00000.mds", "validation/index.json", "tokenizer.json"]
)
def test_in_a_data_set(tiny_data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    path = as_pipe(data / name)
    assert main(["data", "verify", str(data), "--processes", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert lines, "named, and not waited for"
    if name.startswith("train"):
        with pytest.raises(UserError, match=f"{path}: (not a regular file|0 bytes)"):
            TokenDataset(data, "train")


@pytest.mark.parametrize("which", ["source", "tokenizer"])
def test_as_source_or_tokenizer(
    source: Path, tokenizer: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"source": source, "tokenizer": tokenizer} | {which: as_pipe(tmp_path / "pipe.parquet")}
    words = ["--tokenizer", str(files["tokenizer"]), "--output", str(tmp_path / "out"), "--processes", "1"]
    assert main(["data", "prepare", str(files["source"]), *words]) == 2
    assert "not a regular file" in capsys.readouterr().err
