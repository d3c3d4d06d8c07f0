"""Paths of which even the question whether they exist fails: one line and exit code 2 in every command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from mythos.config.load import to_dict
from tests.cluster import REPO, clean_environment
from tests.require import require
from tests.tiny import tiny_config

WITHOUT_PRIVILEGES = "--bounding-set=-dac_override,-dac_read_search"
"""The capabilities with which root may search any directory."""
PREPARE = ["data", "prepare", str(REPO / "demo/sotu.parquet"), "--sequence-length", "8", "--processes", "1"]
COMMANDS = {
    "status": ["status", "PATH"],
    "list": ["checkpoint", "list", "PATH"],
    "verify": ["checkpoint", "verify", "PATH"],
    "export": ["export", "PATH"],
    "eval": ["eval", "PATH"],
    "config": ["config", "PATH"],
    "data verify": ["data", "verify", "--processes", "1", "PATH"],
    "data show": ["data", "show", "PATH"],
    "output": [*PREPARE, "--tokenizer", "TOKENIZER", "--output", "PATH"],
    "tokenizer": [*PREPARE, "--output", "new", "--tokenizer", "PATH"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train = ["data", "tokenizer", "demo/sotu.parquet", "--vocabulary-size", "300", "--sample-mb", "1"]
    assert main([*train, "--output", str(path)]) == 0
    return str(path)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_name_that_is_too_long(words: list[str], tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = "x" * 300
    assert main([{"PATH": path, "TOKENIZER": tokenizer}.get(word, word) for word in words]) == 2
    assert path in capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_path_below_a_directory_that_may_not_be_searched(words: list[str], tokenizer: str, tmp_path: Path) -> None:
    path = closed_directory(tmp_path) / "run"
    done = without_privileges([{"PATH": str(path), "TOKENIZER": tokenizer}.get(word, word) for word in words])
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_directory_below_a_directory_that_may_not_be_searched(tiny_data: Path, tmp_path: Path) -> None:
    path = closed_directory(tmp_path) / "run"
    config = tiny_config("dense", tiny_data, path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    done = without_privileges(["train", str(tmp_path / "run.yaml")])
    assert done.returncode == 2, done.stderr
    message = (
        f"mythos: run.directory = '{path}': Permission denied ({path}/config.yaml): choose a directory that can be"
    )
    assert message in done.stderr.splitlines()[-1]


def closed_directory(parent: Path) -> Path:
    directory = parent / "closed"
    directory.mkdir(mode=0o000)
    return directory


def without_privileges(words: list[str]) -> subprocess.CompletedProcess[str]:
    enter = [require("setpriv"), WITHOUT_PRIVILEGES] if os.getuid() == 0 else []
    command = [*enter, sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=clean_environment(), cwd=REPO, timeout=100, check=False
    )
