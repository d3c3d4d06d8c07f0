"""Every command where the locale is ASCII, but text, tokenizer and paths are not. All files have the umask's modes."""

import json
import os
import random
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.cluster import clean_environment, run
from tests.tiny import BLOCK

BIN = Path(sys.executable).parent
WORDS = ("Grüße", "Ærø", "naïve", "🎉", "日本語", "слово", "façade", "🚀")
PROMPT = "Grüße 🎉"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
VOCABULARY = 300


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Text, and the configuration of a run of two steps, under names that are not ASCII."""
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=60)) for _ in range(200)]
    pq.write_table(pa.table({"téxt": texts}), tmp_path / "datén.parquet")
    config = {
        "model": BLOCK | {"kind": "dense", "layers": 1, "vocabulary_size": VOCABULARY},
        "device": "cpu",
        "train": {"steps": 2, "global_batch_sequences": 2, "micro_batch_sequences": 2},
        "optim": {"learning_rate": 1e-3, "warmup_steps": 1},
        "eval": {"every": 2, "sequences": 2},
        "data": {"directory": "dätä", "sequence_length": 32},
        "sample": {"prompt": PROMPT, "tokens": 4},
    }
    (tmp_path / "modèle.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return tmp_path


def mythos(directory: Path, umask: int, *words: str, **environment: str) -> str:
    """Run a command there and return what it has printed, to stdout and then to stderr."""
    before = os.umask(umask)
    try:
        done = run([BIN / "mythos", *words], limit_s=100, env=clean_environment() | ASCII | environment, cwd=directory)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def wrong_modes(umask: int, *places: Path) -> Iterator[str]:
    """The files and directories whose mode is not that of the umask."""
    for place in places:
        for path in (place, *place.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
                yield f"{path}: {mode:o}"


def test_all_commands_work_and_share_their_files(directory: Path) -> None:
    tokenizer, data, trained = directory / "tökenizer.json", directory / "dätä", directory / "läufe" / "größe"
    source = ["datén.parquet", "--column", "téxt"]
    mythos(directory, 0o002, "data", "tokenizer", *source, "--output", tokenizer.name, "--vocabulary-size", "300",
           "--validation-percent", "10")  # fmt: skip
    prepare = ["--tokenizer", tokenizer.name, "--output", data.name, "--sequence-length", "32", "--processes", "2"]
    assert mythos(directory, 0o002, "data", "prepare", *source, *prepare).startswith("dätä: train ")
    assert not [*wrong_modes(0o002, tokenizer, tokenizer.with_suffix(".training.json"), data)]

    printed = mythos(directory, 0o027, "train", "modèle.yaml", "run.directory=läufe/größe")
    assert f'sample: "{PROMPT}' in printed
    assert "run directory: läufe/größe" in printed
    assert (trained / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))["sample"]["prompt"] == PROMPT
    assert PROMPT in (trained / "log" / "rank_00000.log").read_text(encoding="utf-8")
    assert not [*wrong_modes(0o027, trained)]

    for latin in ({}, {"PYTHONIOENCODING": "latin-1"}):
        assert mythos(directory, 0o022, "status", "läufe/größe", **latin).splitlines()[0].split() == [
            "run",
            "läufe/größe",
        ]
    status = json.loads(mythos(directory, 0o022, "status", "läufe/größe", "--json"))
    assert (status["directory"], status["state"]) == ("läufe/größe", "finished")
    mythos(directory, 0o022, "eval", "läufe/größe")
    mythos(directory, 0o022, "export", "läufe/größe", "--output", "expört")
    assert not [*wrong_modes(0o022, trained / "evaluations", directory / "expört")]


def test_errors_and_the_configuration_are_printed(directory: Path) -> None:
    environ = clean_environment() | ASCII
    done = run([BIN / "mythos", "train", "fehlt-ä.yaml"], limit_s=60, env=environ, cwd=directory)
    assert (done.returncode, done.stderr.startswith("mythos: fehlt-ä.yaml: No such file")) == (2, True)
    done = run([BIN / "mythos", "config", os.fsdecode(b"l\xe9.yaml")], limit_s=60, env=environ, cwd=directory)
    assert done.returncode == 2
    assert done.stderr == "mythos: l\\xe9.yaml: not UTF-8: rename the file, or give the text as UTF-8\n"
    printed = mythos(directory, 0o022, "config", "modèle.yaml", "run.directory=größe", "--ranks", "1")
    assert yaml.safe_load(printed)["run"]["directory"] == "größe"
