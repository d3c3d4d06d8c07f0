"""What the program prints, and its exit code, when its output cannot be written or its start is interrupted."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mythos.config.load import to_dict
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from tests.cluster import REPO, clean_environment, run
from tests.tiny import tiny_config

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


@pytest.mark.parametrize(("shell", "closed"), [("<&- >&- 2>&-", (0, 1, 2)), ("<&- 2>&-", (0, 2)), ("2>&-", (2,))])
def test_no_other_file_gets_the_descriptor_of_a_closed_stream(
    shell: str, closed: tuple[int, ...], tmp_path: Path
) -> None:
    """Nor in child processes: libraries would print into that file."""
    seen = tmp_path / "seen"
    (tmp_path / "child.py").write_text(
        f"import os; open({str(seen)!r}, 'w').write(' '.join(os.readlink(f'/proc/self/fd/{{n}}') for n in range(3)))",
        encoding="utf-8",
    )
    (tmp_path / "typer.py").write_text(
        f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'child.py')!r}])", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), clean_environment()["PYTHONPATH"]])
    program(["params", MODEL], shell, PYTHONPATH=path)
    files = seen.read_text(encoding="utf-8").split()
    assert [files[number] for number in closed] == ["/dev/null"] * len(closed)


def test_a_run_without_a_stderr_whose_working_directory_is_removed_finishes(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("dense", tiny_data, tmp_path / "run", sample__tokens=0, eval__every=10, train__steps=40)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    (tmp_path / "removed").mkdir()
    command = [sys.executable, "-m", "launch.cli", "train", str(tmp_path / "run.yaml")]
    shell = ["bash", "-c", 'exec "$@" 2>&-', "bash", *command]
    with subprocess.Popen(shell, cwd=tmp_path / "removed", env=clean_environment()) as training:
        while not any("train/loss" in line for line in read_metrics(tmp_path / "run")):
            assert training.poll() is None
            time.sleep(0.05)
        (tmp_path / "removed").rmdir()
        assert training.wait(100) == 0
    status = read_status(tmp_path / "run")
    assert (status.state, status.checkpoint_step) == ("finished", 40)


def test_a_rank_that_has_done_its_work_is_not_aborted_at_the_end(tiny_data: Path, tmp_path: Path) -> None:
    """Destructors and exit handlers of libraries would run when the interpreter ends; here one of them aborts."""
    config = tiny_config("dense", tiny_data, tmp_path / "run", sample__tokens=0, train__steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\nif 'train' in sys.orig_argv: atexit.register(os.abort)\n", encoding="utf-8"
    )
    environ = clean_environment()
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environ["PYTHONPATH"]])
    done = run([sys.executable, "-m", "launch.cli", "train", tmp_path / "run.yaml"], 100, environ)
    assert done.returncode == 0, done.stderr
    assert "step 1/1 loss" in done.stdout + done.stderr, "everything was printed"
    assert read_status(tmp_path / "run").state == "finished"


@pytest.mark.parametrize("words", [["params", MODEL], ["status", "."]])
def test_a_working_directory_that_was_removed_is_one_line(words: list[str], tmp_path: Path) -> None:
    inside = ["bash", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "removed")]
    (tmp_path / "removed").mkdir()
    done = subprocess.run(
        [*inside, sys.executable, "-m", "launch.cli", *words],
        capture_output=True,
        encoding="utf-8",
        env=clean_environment(),
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "mythos: the working directory cannot be used (No such file or directory): it may have been removed: change to "
        "another one\n",
    )


def test_findings_that_cannot_be_printed_keep_their_exit_code(tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / "train" / "shard.00000.mds").write_bytes(b"damaged")
    for shell in ("2>/dev/full", "2>&-", ""):
        done = program(["data", "verify", str(data), "--processes", "1"], shell)
        assert done.returncode == 2, shell
    assert "shard.00000.mds" in done.stderr


INTERRUPT = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, where it is ignored
os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_while_the_commands_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(INTERRUPT, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), clean_environment()["PYTHONPATH"]])
    done = program(["params", MODEL], PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "mythos: interrupted\n")
