import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from mythos.data.dataset import TokenDataset


def command(*words: object) -> int:
    return main(["data", *map(str, words)])


def test_from_text_to_rows(source: Path, speeches: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer, output = tmp_path / "tokenizer.json", tmp_path / "data"
    share = ("--validation-percent", 5)
    assert command("tokenizer", source, "--vocabulary-size", 400, *share, "--output", tokenizer) == 0
    line = capsys.readouterr().out
    assert "400 tokens" in line
    assert "bytes/token on 0.0" in line

    options = ("--sequence-length", 32, "--packing", "straight", "--processes", 1)
    prepare = ("prepare", source, "--tokenizer", tokenizer, *options, "--output", output)
    assert command(*prepare) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "train 12 documents (12 cut)" in line
    assert "validation 2 documents" in line  # the percentage that the tokenizer's record names
    assert "bytes/token" in line
    assert "MB/s" in line
    assert command(*prepare) == 0
    assert "already prepared" in capsys.readouterr().out

    assert command("show", output, "--split", "train", "--count", 1) == 0
    shown = capsys.readouterr().out
    assert "<|bos|>" + speeches[0][:40] in shown
    assert "row 1 of" not in shown
    assert command("show", output, "--split", "validation", "--count", 2) == 0
    assert "validation row 1 of" in capsys.readouterr().out
    assert command("show", output, "--row", 7, "--count", 1, "--ids") == 0
    header, ids = capsys.readouterr().out.splitlines()
    assert "train row 7 of" in header
    assert list(map(int, ids.split())) == TokenDataset(output, "train")[7].tolist()
    assert command("verify", output, "--processes", 1) == 0
    capsys.readouterr()
    assert command("show", output, "--row", 99999) == 2
    assert "--row 99999: the train split has rows 0 to" in capsys.readouterr().err
    assert command("show", output, "--count", 0) == 2
    assert "--count 0: give at least 1" in capsys.readouterr().err
    tokenizer.write_text((output / "tokenizer.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    tokenizer.replace(output / "tokenizer.json")
    assert command("show", output) == 2
    assert "tokenizer.json: not the tokenizer that made the ids" in capsys.readouterr().err
    assert command("show", output, "--ids") == 0
    assert command("verify", output, "--processes", 1) == 2


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, launch.commands; "
        "sys.exit(bool({'numpy', 'pyarrow', 'tokenizers', 'streaming', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
