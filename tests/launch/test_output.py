"""What the program prints, and its exit code, when its output cannot be written or its start is interrupted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import REPO, clean_environment

MODEL, RUN = "configs/model/tiny-dense.yaml", "configs/run/demo.yaml"
COMMANDS = {
    "short": ["params", MODEL],
    "longer than a buffer": ["config", MODEL, RUN, "--ranks", "1"],
    "help": ["--help"],
}


def program(words: list[str], shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`mythos` with these words, and what the shell adds after them, such as a redirection."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-m", "launch.cli", *words],
        capture_output=True,
        encoding="utf-8",
        env=clean_environment() | environment,
        cwd=REPO,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_under_the_output_is_one_line(words: list[str], unbuffered: str) -> None:
    done = program(words, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (
        1,
        "mythos: the output cannot be written (No space left on device): free space, or write it to another place\n",
    )


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    done = program(words, "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_exit_code_is_right_where_nothing_can_be_printed() -> None:
    for shell in (">&-", "2>&-", ">&- 2>&-", ">/dev/null 2>/dev/full"):
        assert program(["params", MODEL], shell).returncode == 0
        assert program(["params", "none.yaml"], shell).returncode == 2


def test_findings_that_cannot_be_printed_keep_their_exit_code(tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / "train" / "shard.00000.mds").write_bytes(b"damaged")
    for shell in ("2>/dev/full", "2>&-", ""):
        done = program(["data", "verify", str(data), "--processes", "1"], shell)
        assert done.returncode == 2, shell
    assert "shard.00000.mds" in done.stderr


def test_an_interrupt_while_the_commands_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), clean_environment()["PYTHONPATH"]])
    done = program(["params", MODEL], PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "mythos: interrupted\n")
