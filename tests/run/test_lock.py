"""The lock of a run directory, held by real processes, with and without flock."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mythos.errors import UserError
from mythos.run import lock
from mythos.run.directory import RunDirectory
from mythos.run.lock import DirectoryMissingError, DirectoryTakenError, RunLock, is_held, read_run_id, take
from mythos.run.lock_file import look
from tests.cluster import clean_environment

OWNER = """
import errno, fcntl, sys, time
from pathlib import Path
from mythos.run import lock
def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "without flock":
    fcntl.flock = refuse
lock.BEAT_S = 0.2
held = lock.take(Path(sys.argv[1]))
held.keep(lambda cause: print(cause, flush=True))
print("held", flush=True)
time.sleep(60)
"""
BOTH = pytest.mark.parametrize("flock", ["with flock", "without flock"])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    monkeypatch.setattr(lock, "STALE_S", 2.0)
    monkeypatch.setattr(lock, "ENDING_S", 0.1)


@contextmanager
def owner(directory: Path, flock: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", OWNER, str(directory), flock]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=clean_environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, too, is on a file system without flock."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)


@BOTH
def test_a_second_start_is_refused_while_the_owner_is_alive(
    flock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owner(tmp_path, flock) as process:
        if flock == "without flock":
            without_flock(monkeypatch)
        assert is_held(tmp_path)
        with pytest.raises(UserError, match=f"process {process.pid} on .* is training here: wait for it, or stop it"):
            take(tmp_path)
        assert is_held(tmp_path)


@BOTH
def test_the_lock_of_a_killed_owner_is_taken(flock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path, flock) as process:
        process.kill()
        process.wait()
    if flock == "without flock":
        without_flock(monkeypatch)
    before = look(RunDirectory(tmp_path).lock)
    assert before is not None
    taken = take(tmp_path)
    after = look(RunDirectory(tmp_path).lock)
    assert after is not None
    assert after.owner == taken.owner != before.owner
    taken.release()
    assert not RunDirectory(tmp_path).lock.exists()
    assert not is_held(tmp_path)


def test_an_owner_on_another_host_is_alive_while_its_file_changes(tmp_path: Path) -> None:
    held = take(tmp_path)
    path = RunDirectory(tmp_path).lock
    held._file.close()  # its flock is not seen from here, as on some shared file systems
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"host": "elsewhere"}), encoding="utf-8")
    renewing = threading.Event()

    def renew() -> None:
        while not renewing.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"process {os.getpid()} on elsewhere is training here"):
            take(tmp_path)
        assert is_held(tmp_path)
    finally:
        renewing.set()
        thread.join()
    started = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - started >= lock.STALE_S, "without an flock in sight, only the missing beats tell"


def test_a_job_that_slurm_has_restarted_waits_for_its_previous_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held = take(tmp_path)
    threading.Timer(0.5, held.release).start()
    with caplog.at_level("WARNING", "mythos"):
        again = take(tmp_path)
    assert re.search(rf"locked by process {os.getpid()} on .*: waiting up to 300 s", caplog.text)
    monkeypatch.setattr(lock, "RESTART_WAIT_S", 0.1)
    with pytest.raises(UserError, match="is training here: wait for it, or stop it$"):
        take(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(UserError, match="tasks of a job array that run at a time need a run.directory each"):
        take(tmp_path)
    again.release()


def test_the_lock_of_version_0_1(tmp_path: Path) -> None:
    path = RunDirectory(tmp_path).lock
    path.write_text(f"process 1234 on {os.uname().nodename}", encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="process 1234 on .* is training here"):
            take(tmp_path)
    take(tmp_path).release()


@BOTH
def test_a_purged_lock_is_put_back(flock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path, flock) as process:
        if flock == "without flock":
            without_flock(monkeypatch)
        RunDirectory(tmp_path).lock.unlink()
        with pytest.raises(UserError, match=f"process {process.pid} on .* is training here"):
            take(tmp_path, has_open_attempt=True)


@pytest.mark.parametrize("content", ["", "{", "[" * 4000, '{"key": 1}', "\xff", "x" * 100_000])
def test_a_damaged_lock_counts_as_free_once_it_is_not_renewed(content: str, tmp_path: Path) -> None:
    RunDirectory(tmp_path).lock.write_bytes(content.encode("latin-1"))
    take(tmp_path).release()


def test_two_starts_that_replace_a_dead_owner_do_not_both_win(tmp_path: Path) -> None:
    for _ in range(20):
        take(tmp_path)._file.close()  # an owner that was killed
        won: list[RunLock] = []
        lost: list[Exception] = []

        def start() -> None:
            try:
                won.append(take(tmp_path))  # noqa: B023
            except UserError as error:
                lost.append(error)  # noqa: B023

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 3)
        won[0].check()
        won[0].release()


def test_the_owner_notices_that_its_directory_is_anothers(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    held = take(run)
    causes: list[str] = []
    held.keep(causes.append)
    held.check()
    run.rename(moved)
    with pytest.raises(DirectoryMissingError, match="moved or removed"):
        held.check()
    run.mkdir()
    with pytest.raises(DirectoryMissingError, match="moved or removed"):
        held.check()
    assert not RunDirectory(run).lock.exists(), "an empty directory in its place is not the run's"
    run.rmdir()
    moved.rename(run)
    held.check()
    run.rename(moved)
    run.mkdir()
    other = take(run)
    assert read_run_id(run) != read_run_id(moved)
    with pytest.raises(DirectoryTakenError, match="taken over by process"):
        held.check()
    assert held._thread is not None
    held._thread.join(10)
    assert causes == [f"{run}: taken over by {other.owner}: this attempt ends without saving"]
    held.release()
    other.check()
    other.release()


def test_an_owner_that_was_suspended_while_another_took_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flock nobody takes over: the flock of a suspended process is still held."""
    with owner(tmp_path, "without flock") as process:
        without_flock(monkeypatch)
        os.kill(process.pid, signal.SIGSTOP)
        taken = take(tmp_path)
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdout is not None
        assert (
            process.stdout.readline() == f"{tmp_path}: taken over by {taken.owner}: this attempt ends without saving\n"
        )
        taken.release()
