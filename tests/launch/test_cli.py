"""The command line: how arguments are read, how errors and results are printed."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from launch.cli import main
from launch.table import Column, plain_lines
from mythos.config.schema import Config
from tests.cluster import REPO, clean_environment
from tests.screen import run_on_terminal, screen_lines

MODEL, RUN = "configs/model/tiny-looped-moe.yaml", "configs/run/demo.yaml"


def test_options_and_overrides_may_stand_between_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", MODEL, "--ranks", "2", "seed=7", RUN, "train.steps=9"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["seed"], found["train"]["steps"], found["optim"]["warmup_steps"]) == (7, 9, 20)


def test_a_value_may_begin_with_a_minus_sign(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", MODEL, RUN, "optim.warmup_steps=-1", "--ranks", "2"]) == 2
    assert "optim.warmup_steps = -1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command: see `mythos --help`"),
        (["tran"], "No such command 'tran'. Did you mean 'train'?: see `mythos --help`"),
        (["train"], "Missing argument 'FILE.yaml|key=value': see `mythos train --help`"),
        (["config", MODEL, "--ranks"], "Option '--ranks' requires an argument: see `mythos"),
        (["data", "show", "x", "--rows", "1"], "No such option: --rows"),
        (["data", "show", "x", "--row", "many"], "Invalid value for '--row': "),
        (["job", MODEL, "--nodes", "0", "--tasks-per-node", "1"], "Invalid value for '--nodes': "),
        (
            ["eval", "runs/x", "step_00000005"],
            "step_00000005: not of the form key=value; name a checkpoint by its step",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mythos: {message}")
    assert captured.err.count("\n") == 1


def test_help_lists_every_command_once_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert sorted(listed) == sorted(
        [
            "train",
            "status",
            "eval",
            "checkpoint",
            "export",
            "generate",
            "config",
            "params",
            "plan",
            "bench",
            "inspect",
            "parity",
            "compare",
            "scaling",
            "data",
            "job",
        ]
    )
    for code in ("0 done", "2 bad input", "74 checkpoints", "85"):
        assert code in " ".join(text.split())
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("tokenizer", "prepare", "import", "verify", "show"):
        assert text.count(f"\n  {name} ") == 1


def test_an_interrupt_and_a_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mythos.config.load.load", interrupted)
    assert main(["config", MODEL]) == 1
    assert capsys.readouterr().err == "mythos: interrupted\n"

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "launch.cli", "params", MODEL],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        cwd=REPO,
        timeout=100,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_table_is_plain_where_stdout_is_no_terminal() -> None:
    rows = [("a", "1,000", "first"), ("longer", "2", "x" * 200)]
    columns = (Column("name"), Column("number", is_number=True), Column("text"))
    assert plain_lines(columns, rows) == ["a       1,000  first", f"longer      2  {'x' * 200}"]
    assert plain_lines(columns, []) == []
    environ = clean_environment() | {"FORCE_COLOR": "1", "COLUMNS": "20"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "params", MODEL],
        capture_output=True,
        encoding="utf-8",
        env=environ,
        cwd=REPO,
        timeout=100,
        check=True,
    )
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert [line.rsplit(None, 2)[0] for line in done.stdout.splitlines()][-3:] == [
        "total",
        "active per token",
        "of which lookup tables",
    ]


def test_a_table_on_a_terminal_has_headers() -> None:
    code, written = run_on_terminal(f"import sys; from launch.cli import main; sys.exit(main(['params', '{MODEL}']))")
    assert code == 0
    lines = [line.split() for line in screen_lines(written) if line.strip()]
    assert lines[0] == ["part", "parameters", "share"]
    assert lines[-1][:4] == ["of", "which", "lookup", "tables"]


def test_consent_may_be_given_several_times_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []

    def instead_of_ranks(
        configure: Callable[[int], Config], work: Callable[[Config, object], int], journal: object
    ) -> int:
        return work(configure(2), "the device")

    def instead_of_training(config: Config, device: object, stop: object, accept: object, known: object) -> int:
        found.extend([config.seed, config.train.steps, accept])
        return 0

    monkeypatch.setattr("launch.train.run_ranks", instead_of_ranks)
    monkeypatch.setattr("mythos.train.loop.train", instead_of_training)
    words = ["train", MODEL, "--accept", "seed", "seed=7", "--accept", "optim.learning_rate", RUN, "train.steps=9"]
    assert main(words) == 0
    assert found == [7, 9, ["seed", "optim.learning_rate"]]
