"""What `mythos status` reports of Slurm's jobs, and of starts that failed before the run had begun."""

import re
from pathlib import Path
from typing import Any

import pytest

from mythos.run.describe import describe as facts
from mythos.run.directory import prepare
from mythos.run.journal import ENDED, FAILED, STARTED, Journal, append_event
from mythos.run.status import Status, read_status
from tests.tiny import tiny_config


def describe(status: Status) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in facts(status).items())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run that has not been started."""
    prepare(tiny_config("looped", tmp_path / "data", tmp_path / "run"), accept=())
    return tmp_path / "run"


def test_no_second_job_is_suggested_while_slurm_may_restart_the_first(directory: Path) -> None:
    started: dict[str, Any] = {"event": STARTED, "command": "mythos train"}
    append_event(directory, **started, slurm={})
    append_event(directory, ENDED, exit_code=85)
    assert "preempted, saved: start it again to resume" in describe(read_status(directory))
    append_event(directory, **started, slurm={"SLURM_JOB_ID": "7"})
    append_event(directory, ENDED, exit_code=85)
    squeue = "`squeue --job=7` shows whether Slurm will restart it"
    assert f"preempted, saved: {squeue}; if not, start it again to resume" in describe(read_status(directory))
    append_event(directory, FAILED, rank=0, host="node1", exit_code=1, message="rank 1 died")
    assert f"rank 1 died (rank 0 on node1, exit code 1); {squeue}" in describe(read_status(directory))
    append_event(directory, **started, slurm={"SLURM_JOB_ID": "7"})
    assert re.search(rf"killed on .*: {squeue}; if not", describe(read_status(directory)))
    append_event(directory, **started, slurm={})
    assert "squeue" not in describe(read_status(directory)), "the last attempt was started outside Slurm"


def test_a_task_of_a_job_array_is_named_as_slurm_names_it(directory: Path) -> None:
    """The last task has the array's number as its SLURM_JOB_ID."""
    for task, job in (("0", "8"), ("1", "7")):
        slurm = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task}
        append_event(directory, STARTED, command="mythos train", slurm=slurm | {"SLURM_RESTART_COUNT": "1"})
    append_event(directory, ENDED, exit_code=85)
    status = read_status(directory)
    assert (status.slurm_jobs, status.slurm_job, status.slurm_restarts) == (["7_0", "7_1"], "7_1", 2)
    assert "`squeue --job=7_1` shows whether" in describe(status)


def test_a_first_start_that_failed_is_seen(tmp_path: Path) -> None:
    """The batch script has created the log directory; the run has no configuration yet."""
    directory = tmp_path / "run"
    (directory / "log").mkdir(parents=True)
    journal = Journal(directory, 0)
    journal.fail("MASTER_PORT = 4000: in use", 2)
    status = read_status(directory)
    assert (status.state, status.steps, status.attempts) == ("failed", None, 0)
    assert "failed: MASTER_PORT = 4000: in use (rank 0 on" in describe(status)
    prepare(tiny_config("looped", tmp_path / "data", directory), accept=())  # the next start may use the directory
    for other in (tmp_path / "documents", tmp_path / "missing"):
        Journal(other, 0).fail("a failure", 2)
        assert not other.exists()
        other.mkdir()
        (other / "thesis.tex").touch()
        Journal(other, 0).fail("a failure", 2)
        assert [path.name for path in other.iterdir()] == ["thesis.tex"]
