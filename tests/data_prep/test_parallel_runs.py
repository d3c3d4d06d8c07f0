"""`mythos data` in several processes and ranks: the same bytes, resumed after kills, one line for an error."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.cluster import clean_environment
from tests.cluster import run as run_command
from tests.data_prep.conftest import VALIDATION_PERCENT, content_of, run
from tests.data_prep.test_documents import damage_row_group
from tests.require import require

LIMIT_S = 150
MYTHOS = [sys.executable, "-m", "launch.cli", "data"]


def command(sources: list[Path], tokenizer: Path, output: Path, *more: str) -> list[str]:
    words = [*MYTHOS, "prepare", *sources, "--tokenizer", tokenizer, "--output", output, "--sequence-length", "64"]
    return [*map(str, words), "--packing", "straight", "--validation-percent", str(VALIDATION_PERCENT), *more]


def mpiexec() -> list[str]:
    return [require(str(Path(sys.executable).parent / "mpiexec")), "-n", "2"]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, "condition not met in time"
        time.sleep(0.01)


def finished_parts(output: Path) -> list[Path]:
    return list(output.with_name(f".{output.name}.partial").glob("parts/*.json"))


@pytest.fixture(scope="module")
def undisturbed(
    several_sources: list[Path], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    run(several_sources, tokenizer, output)
    return content_of(output)


# --- the command ------------------------------------------------------------------------------------------------------


def test_two_mpi_ranks_write_the_same_bytes(
    several_sources: list[Path], tokenizer: Path, tmp_path: Path, undisturbed: dict[str, bytes]
):
    done = run_command([*mpiexec(), *command(several_sources, tokenizer, tmp_path / "data")], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert content_of(tmp_path / "data") == undisturbed
    again = run_command([*mpiexec(), *command(several_sources, tokenizer, tmp_path / "data")], LIMIT_S)
    assert again.returncode == 0, again.stderr
    assert "already prepared" in again.stdout
    checked = run_command([*mpiexec(), *MYTHOS, "verify", tmp_path / "data"], LIMIT_S)
    assert (checked.returncode, checked.stdout.count(": valid; ")) == (0, 1), checked.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_line(several_sources: list[Path], tokenizer: Path, tmp_path: Path, ranks: int):
    launcher, more = ([], ["--processes", "2"]) if ranks == 1 else (mpiexec(), [])
    damaged = damage_row_group(several_sources[0], tmp_path / "damaged.parquet", row_group=2)
    no_parquet = tmp_path / "notes.txt"
    no_parquet.write_text("no Parquet " * 100, encoding="utf-8")
    for sources, output, complaint in [
        ([*several_sources[:2], damaged], tmp_path / "data", f"{damaged}: row group 2 is damaged"),
        ([*several_sources[:2], no_parquet], tmp_path / "data", f"{no_parquet}: not a readable Parquet file"),
    ]:
        done = run_command([*launcher, *command(sources, tokenizer, output, *more)], LIMIT_S)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("mythos:")]
        assert len(lines) == 1
        assert complaint in lines[0]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_is_resumed(
    several_sources: list[Path], tokenizer: Path, tmp_path: Path, undisturbed: dict[str, bytes], ranks: int
):
    launcher, more = ([], ["--processes", "2"]) if ranks == 1 else (mpiexec(), [])
    output = tmp_path / "data"
    process = subprocess.Popen(
        [*launcher, *command(several_sources, tokenizer, output, *more)],
        env=clean_environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(finished_parts(output)) >= 2)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(LIMIT_S)
    assert not output.exists()
    work = tmp_path / ".data.partial"
    finished = finished_parts(output)
    assert 2 <= len(finished) < len(several_sources)

    # Finished parts are used again: a change in one of them, in its first row, is found in the data set.
    marked = tmp_path / "marked"
    marked.mkdir()
    shutil.copytree(work, marked / ".data.partial")
    name = finished[0].stem
    part = marked / ".data.partial/parts" / f"{name}.train"
    part.write_bytes(np.full(65, 511, dtype=np.uint16).tobytes() + part.read_bytes()[130:])
    run(several_sources, tokenizer, marked / "data")
    different = {file for file, content in content_of(marked / "data").items() if content != undisturbed[file]}
    assert different == {"train/shard.00000.mds", "train/index.json"}

    (work / "parts" / "half.train.elsewhere.1.unfinished").write_bytes(b"half")
    done = run_command([*launcher, *command(several_sources, tokenizer, output, *more)], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert content_of(output) == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["data", "marked"]


def test_a_killed_worker_process_ends_the_run_and_its_parts_stay(
    several_sources: list[Path], tokenizer: Path, tmp_path: Path
):
    output = tmp_path / "data"
    process = subprocess.Popen(
        command(several_sources, tokenizer, output, "--processes", "2"),
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    wait_for(lambda: len(finished_parts(output)) >= 1)
    for child in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
            break
    error = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert "died: it was killed or ran out of memory; run the same command again" in error
    assert finished_parts(output)


def test_a_killed_rank_ends_the_others(several_sources: list[Path], tokenizer: Path, tmp_path: Path):
    output = tmp_path / "data"
    process = subprocess.Popen(
        [*mpiexec(), *command(several_sources, tokenizer, output)],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    wait_for(lambda: len(finished_parts(output)) >= 1)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.environ().get("PMI_RANK") == "1" and "launch.cli" in child.cmdline():
                child.kill()
    process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert not output.exists()


def test_a_second_run_for_the_same_output_is_refused(several_sources: list[Path], tokenizer: Path, tmp_path: Path):
    output = tmp_path / "data"
    words = command(several_sources, tokenizer, output, "--processes", "2")
    first = subprocess.Popen(words, env=clean_environment(), stdout=subprocess.PIPE, encoding="utf-8")
    wait_for(lambda: (tmp_path / ".data.partial/parts").exists())
    first.send_signal(signal.SIGSTOP)  # so that it cannot finish before the second is refused
    try:
        second = run_command(words, LIMIT_S)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert f"process {first.pid} on {socket.gethostname()} is writing this output" in second.stderr
    assert second.stderr.count("\n") == 1
    assert first.communicate(timeout=LIMIT_S)[0].count("\n") == 1
    assert first.returncode == 0


def test_processes_and_ranks_are_not_mixed(several_sources: list[Path], tokenizer: Path, tmp_path: Path):
    words = command(several_sources, tokenizer, tmp_path / "data", "--processes", "2")
    done = run_command([*mpiexec(), *words], LIMIT_S)
    assert done.returncode == 2
    assert "2 ranks share the work; leave --processes out" in done.stderr
    assert run_command(command(several_sources, tokenizer, tmp_path, "--processes", "0"), LIMIT_S).returncode == 2
