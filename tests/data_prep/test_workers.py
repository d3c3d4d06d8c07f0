"""Workers as processes and as ranks, and what happens when one fails or dies: all end in seconds, with one line."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep.parts import HashSource
from data_prep.workers import WorkerLost, Workers, serve
from mythos.errors import UserError
from mythos.ranks import token
from mythos.ranks.messages import Listener
from mythos.ranks.world import World
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
        assert time.monotonic() < until, "it did not happen"
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


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> World:
    """Rank 0 of two; it starts no local process, so that rank 1 does all the work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return World("mpich", 0, 2, 0, 2, "127.0.0.1", probe.getsockname()[1], "secret")


def rank_1_of(world: World) -> World:
    return replace(world, rank=1, local_rank=1)


def start_rank_1(world: World) -> subprocess.Popen[str]:
    code = (
        "import sys; from data_prep.workers import serve; from mythos.ranks.world import World; "
        f"sys.exit(serve(World('mpich', 1, 2, 1, 2, '127.0.0.1', {world.port}, {world.token!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=clean_environment(), stderr=subprocess.PIPE, text=True)


def hash_all(workers: Workers, paths: list[Path]) -> list[object]:
    results = dict(workers.run([HashSource(str(path)) for path in paths], lambda done_bytes: None))
    return [results[number] for number in range(len(paths))]


def test_rank_1_does_the_work_and_strangers_get_none(world: World, several_sources: list[Path]):
    hello = json.dumps({"token": "guess", "rank": 1, "host": "elsewhere", "process": 1}).encode()
    contents = [b"", b"\x00\x00", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[" * 200_000]
    contents += [struct.pack(">I", len(text)) + text for text in (b'{"rank": 1}', hello)]
    with Workers(world, processes=0) as workers, contextlib.ExitStack() as cleanup:
        strangers = []
        for content in contents:
            strangers.append(cleanup.enter_context(socket.create_connection((world.address, world.port))))
            strangers[-1].sendall(content)
        rank_1 = start_rank_1(world)
        sizes = [size for size, _ in hash_all(workers, several_sources)]  # type: ignore[misc]
        for stranger in strangers:
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                assert stranger.recv(1) == b"", "it was sent something"
    assert sizes == [path.stat().st_size for path in several_sources]
    assert rank_1.wait(LIMIT_S) == 0


def test_ranks_that_share_no_secret_find_it_in_a_file(
    world: World, several_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    world = replace(world, token=None)
    token.publish_token(world, "left by a killed job")
    rank_1 = start_rank_1(world)
    time.sleep(1)  # rank 1 finds the old file, too
    with Workers(world, processes=0) as workers:
        assert len(hash_all(workers, several_sources)) == len(several_sources)
    assert rank_1.wait(LIMIT_S) == 0
    assert not token.token_file(world).exists()


def test_a_rank_without_the_secret_is_refused(
    world: World, several_sources: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data_prep.workers.MEET_TIMEOUT_S", 1.0)
    with Workers(world, processes=0) as workers:
        rank_1 = start_rank_1(world)
        refused: list[str] = []

        def serve_with_a_guess() -> None:
            try:
                serve(replace(rank_1_of(world), token="guess"))
            except WorkerLost as error:
                refused.append(str(error))

        stranger = threading.Thread(target=serve_with_a_guess)
        stranger.start()
        while stranger.is_alive():
            assert len(hash_all(workers, several_sources)) == len(several_sources)
    assert "it refuses this process" in refused[0]
    assert rank_1.wait(LIMIT_S) == 0


def test_an_error_on_rank_1_is_reported_by_rank_0_and_ends_both(
    world: World, several_sources: list[Path], tmp_path: Path
):
    rank_1 = start_rank_1(world)
    gone = tmp_path / "gone.parquet"
    with pytest.raises(UserError, match=rf"{gone}: No such file"), Workers(world, processes=0) as workers:
        hash_all(workers, [*several_sources, gone])
    assert rank_1.wait(LIMIT_S) == 2
    assert rank_1.communicate()[1] == ""


def test_a_dead_rank_1_ends_rank_0(world: World, several_sources: list[Path]):
    rank_1 = start_rank_1(world)
    with Workers(world, processes=0) as workers:
        hash_all(workers, several_sources)
        rank_1.kill()
        rank_1.wait()
        with pytest.raises(WorkerLost, match=rf"rank 1 on {socket.gethostname()} \(process {rank_1.pid}\) died"):
            hash_all(workers, several_sources)


def test_a_dead_rank_0_ends_rank_1(world: World):
    with Listener("secret", 1, world.port) as listener:
        rank_1 = start_rank_1(world)
        peers = listener.accept(LIMIT_S)
        while not peers:
            peers = listener.accept(LIMIT_S)
        peers[0].channel.close()
        assert rank_1.wait(LIMIT_S) == 1
    assert "rank 0 died" in rank_1.communicate()[1]


def test_a_rank_0_that_never_responds(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.workers.MEET_TIMEOUT_S", 0.5)
    with pytest.raises(WorkerLost, match=rf"rank 0 does not respond at 127\.0\.0\.1:{world.port}"):
        serve(rank_1_of(world))


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
    no_parquet.write_text("no Parquet " * 100)
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
        text=True,
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
        text=True,
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
    first = subprocess.Popen(words, env=clean_environment(), stdout=subprocess.PIPE, text=True)
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
