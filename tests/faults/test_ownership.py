"""Runs whose directory is moved away, or is on a file system without flock."""

import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from launch.cli import main
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.errors import BAD_INPUT
from mythos.run.directory import RunDirectory
from mythos.run.journal import FAILED, read_events
from mythos.run.lock import read_run_id
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from tests.faults.supervise import configuration
from tests.spawn import Job

pytestmark = pytest.mark.slow
LIMIT_S = 120
ENDLESS = 100_000


def train(arguments: list[str], flock: str = "with flock") -> int:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if flock == "without flock":
        import fcntl

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        fcntl.flock = refuse
    return main(["train", *arguments])


def start(config: Config, directory: Path, name: str, *more: str) -> Job:
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    return Job(1, train, [str(file)], *more, output=directory / f"{name}.log")


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + LIMIT_S
    while max((line["step"] for line in read_metrics(run)), default=0) < step:
        assert time.monotonic() < until
        time.sleep(0.1)


def content(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Moved(NamedTuple):
    """A run that is training while its directory is elsewhere."""

    job: Job
    run: Path
    """Where the directory was."""
    moved: Path


@pytest.fixture
def lost(tiny_data: Path, tmp_path: Path) -> Iterator[Moved]:
    config = configuration(tiny_data, tmp_path, ranks=1, train__steps=ENDLESS, checkpoint__every=ENDLESS)
    run, moved = Path(config.run.directory), tmp_path / "moved"
    job = start(config, tmp_path, "first")
    try:
        wait_for_step(run, 7)
        run.rename(moved)
        yield Moved(job, run, moved)
    finally:
        job.kill()


def test_a_run_whose_directory_another_run_has_taken_harms_nothing(
    lost: Moved, tiny_data: Path, tmp_path: Path
) -> None:
    second = start(configuration(tiny_data, tmp_path, ranks=1, train__steps=8), tmp_path, "second")
    assert second.wait(LIMIT_S) == 0, second.text()
    # The lock of a run that has finished is gone; that of one which is training ends the first one by itself.
    other = '{"key": "k", "host": "elsewhere", "process": 1, "has_flock": false}'
    RunDirectory(lost.run).lock.write_text(other, encoding="utf-8")
    before = content(lost.run)
    assert lost.job.wait(LIMIT_S) == BAD_INPUT, lost.job.text()
    assert content(lost.run) == before
    assert re.search(rf"{lost.run}: taken over by process \d+ on \S+: this attempt ends", lost.job.text())
    event = read_events(lost.moved)[-1]
    assert (event["event"], "taken over" in event["message"]) == (FAILED, True)
    assert read_run_id(lost.run) != read_run_id(lost.moved)


def test_a_stop_saves_nothing_into_the_directory_of_another_run(lost: Moved) -> None:
    shutil.copytree(lost.moved, lost.run, ignore=shutil.ignore_patterns("run_id", ".lock"))
    RunDirectory(lost.run).run_id.write_text("another", encoding="utf-8")
    before = content(lost.run)
    for process in lost.job._processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    assert lost.job.wait(LIMIT_S) not in (0, 85), lost.job.text()
    assert content(lost.run) == before
    assert "the run's directory was moved or removed" in lost.job.text()


def test_a_checkpoint_of_another_run_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path, ranks=1, train__steps=6, optim__cooldown="constant")
    run = Path(config.run.directory)
    assert start(config, tmp_path, "first").wait(LIMIT_S) == 0
    RunDirectory(run).run_id.write_text("another\n", encoding="utf-8")
    longer: Any = configuration(tiny_data, tmp_path, ranks=1, train__steps=8, optim__cooldown="constant")
    second = start(longer, tmp_path, "second")
    assert second.wait(LIMIT_S) == BAD_INPUT
    assert "step_00000006: of another run (" in second.text()
    assert "this directory's run_id is another): move it out of this directory" in second.text()


def test_without_flock_a_second_start_is_refused_and_the_status_is_right(tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path, ranks=1, train__steps=ENDLESS)
    run = Path(config.run.directory)
    first = start(config, tmp_path, "first", "without flock")
    try:
        wait_for_step(run, 7)
        assert read_status(run).state == "running"
        second = start(config, tmp_path, "second", "without flock")
        assert second.wait(LIMIT_S) == BAD_INPUT
        assert "is training here: wait for it, or stop it" in second.text()
        assert read_status(run).state == "running"
        latest = RunDirectory(run).latest.read_text(encoding="utf-8")
        RunDirectory(run).lock.unlink()
        third = start(config, tmp_path, "third", "without flock")
        assert third.wait(LIMIT_S) == BAD_INPUT, "a purge of .lock does not let a second start in"
        assert "is training here" in third.text()
        assert RunDirectory(run).latest.read_text(encoding="utf-8") >= latest
    finally:
        first.kill()
