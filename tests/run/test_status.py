"""`mythos status` reports the true state of a run from its directory alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mythos.errors import UserError
from mythos.run.describe import describe as facts
from mythos.run.directory import STATE_FILE, RunDirectory, prepare
from mythos.run.journal import ENDED, FAILED, STARTED, Journal, append_event, environment, read_attempts, read_events
from mythos.run.lock import is_held, take
from mythos.run.status import TAIL_BYTES, Status, read_status
from tests.cluster import clean_environment, run
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import failure, run_training

METRICS = {"train/loss": 2.5, "train/tokens": 1200.0, "perf/tokens_per_second": 60.0}


def describe(status: Status) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in facts(status).items())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run of 20 steps of 120 tokens that is at step 10."""
    run_directory = tmp_path / "run"
    prepare(tiny_config("looped", tmp_path / "data", run_directory), accept=())
    lines = [{"step": 0, "val/loss_depth_3": 4.0}, {"step": 9, **METRICS}, {"step": 10, **METRICS}]
    run = RunDirectory(run_directory)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1', encoding="utf-8")
    saved = run.checkpoints / "step_00000008"
    saved.mkdir()
    (saved / STATE_FILE).write_text('{"step": 8}', encoding="utf-8")
    run.latest.write_text("step_00000008\n", encoding="utf-8")
    return run_directory


def test_a_running_run(directory: Path) -> None:
    append_event(directory, STARTED)
    held = take(directory)
    status = read_status(directory)
    assert (status.state, status.step, status.steps, status.tokens, status.loss) == ("running", 10, 20, 1200, 2.5)
    assert (status.tokens_per_second, status.seconds_left) == (60.0, 20.0), "10 steps of 120 tokens at 60 a second"
    assert (status.checkpoint, status.checkpoint_step) == ("step_00000008", 8)
    assert status.validation == {"val/loss_depth_3": 4.0}
    text = describe(status)
    assert "step        10 of 20 (50.0%)" in text
    assert re.search(r"left        20 s, finished at about \d{4}-", text)
    assert json.loads(status.to_json())["state"] == "running"
    held.release()
    assert read_status(directory).state == "killed", "the lock is free and no end was recorded"


@pytest.mark.parametrize(
    ("events", "state", "cause"),
    [
        ([], "not started", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 85})], "preempted", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 0})], "finished", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 85}), (STARTED, {}), (ENDED, {"exit_code": 0})], "finished", None),
        ([(STARTED, {"host": "elsewhere"})], "killed", None),
        (
            [
                (STARTED, {}),
                (FAILED, {"rank": 1, "exit_code": 85, "message": "not saved within 50 s"}),
                (FAILED, {"rank": 0, "exit_code": 85, "message": "rank 1 failed: not saved within 50 s"}),
            ],
            "preempted",
            "not saved within 50 s",
        ),
        (
            [
                (STARTED, {}),
                (FAILED, {"rank": 3, "host": "node2", "exit_code": 1, "message": "disk on fire"}),
                (FAILED, {"rank": 0, "host": "node1", "exit_code": 1, "message": "connection closed"}),
            ],
            "failed",
            "disk on fire (rank 3 on node2, exit code 1)",
        ),
        (
            [
                (FAILED, {"rank": 0, "host": "node1", "exit_code": 2, "message": "no such host"}),  # an attempt before
                (FAILED, {"rank": 0, "host": "node1", "exit_code": 2, "message": "no data"}),
            ],
            "failed",
            "no data (rank 0 on node1, exit code 2)",
        ),
        (
            [(FAILED, {"host": "node1", "exit_code": 137, "message": "job 7 ended: see log/slurm-7.out"})],
            "failed",
            "job 7 ended: see log/slurm-7.out (node1, exit code 137)",
        ),
        (
            [
                (STARTED, {}),
                (ENDED, {"exit_code": 85}),
                (FAILED, {"rank": 0, "host": "node1", "exit_code": 2, "message": "no data"}),
            ],
            "failed",
            "no data (rank 0 on node1, exit code 2)",
        ),
    ],
)
def test_how_the_last_attempt_ended(
    events: list[tuple[str, dict[str, object]]], state: str, cause: str | None, directory: Path
) -> None:
    for event, details in events:
        append_event(directory, event, **details)
    status = read_status(directory)
    assert (status.state, status.cause) == (state, cause)
    assert f"state       {state}" in describe(status)


@pytest.mark.parametrize("written_by_version_0_1", [0, 3, 4])
def test_jobs_and_restarts_are_counted(written_by_version_0_1: int, directory: Path) -> None:
    jobs = [("7", None), ("7", "1"), ("7", "2"), ("9", None)]
    attempts = [{"slurm": {"SLURM_JOB_ID": job} | ({"SLURM_RESTART_COUNT": n} if n else {})} for job, n in jobs]
    of_version_0_1, later = attempts[:written_by_version_0_1], attempts[written_by_version_0_1:]
    RunDirectory(directory).environment.write_text(json.dumps(of_version_0_1), encoding="utf-8")
    for _ in of_version_0_1:
        append_event(directory, STARTED)  # version 0.1 recorded the start, but not its environment, in events.jsonl
    for attempt in [*later, {"slurm": {}}]:
        append_event(directory, STARTED, command="mythos train", **attempt)
    status = read_status(directory)
    assert (status.attempts, status.slurm_jobs, status.slurm_restarts) == (5, ["7", "9"], 2)
    assert "slurm jobs  7, 9 (2 restarts)" in describe(status)


def test_only_the_end_of_long_metrics_is_read(directory: Path) -> None:
    with RunDirectory(directory).metrics.open("a", encoding="utf-8") as file:
        file.write("\n")
        for step in range(11, 20_011):
            file.write(json.dumps({"step": step, "train/loss": 1.0, "train/tokens": 120.0 * step}) + "\n")
    assert RunDirectory(directory).metrics.stat().st_size > 2 * TAIL_BYTES
    status = read_status(directory)
    assert (status.step, status.loss) == (20_010, 1.0)
    assert status.validation == {}, "the line is at the beginning of the file, which is not read"


def test_damaged_files_are_ignored_or_named(directory: Path) -> None:
    run = RunDirectory(directory)
    run.events.write_text('{"event": "start', encoding="utf-8")
    run.environment.write_text("[{", encoding="utf-8")
    run.latest.write_text("step_99999999", encoding="utf-8")
    run.metrics.write_bytes(b"\xff\xfe\n[1]\n")
    status = read_status(directory)
    assert (status.state, status.step, status.checkpoint, status.loss) == ("not started", 0, None, None)
    assert "environment.json: damaged" in facts(status)["problem"]
    run.config.write_text("train: 5", encoding="utf-8")
    assert "config.yaml: damaged (train: " in str(read_status(directory).problem)
    with pytest.raises(UserError, match="not a run directory"):
        read_status(directory / "nowhere")


def test_the_command_needs_no_torch_and_no_process(directory: Path, tmp_path: Path) -> None:
    append_event(directory, ENDED, exit_code=85)
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = run([sys.executable, "-c", code, "status", directory], 30)
    assert done.returncode == 0, done.stderr
    assert "state       preempted, saved: start it again to resume" in done.stdout
    done = run([sys.executable, "-c", code, "status", tmp_path / "none"], 30)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mythos: {tmp_path / 'none'}: not a run directory")


HOLD = """
import sys, time
from pathlib import Path
from mythos.run.lock import take
from mythos.run.journal import STARTED, append_event
held = take(Path(sys.argv[1]))
append_event(Path(sys.argv[1]), STARTED)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_not_reported_as_running(directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, encoding="utf-8", env=clean_environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_held(directory)
        assert read_status(directory).state == "running"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    status = read_status(directory)
    assert status.state == "killed"
    assert re.search(r"killed on \S+ before it could record a cause, last write \d+ s ago", describe(status))


def test_lines_of_many_writers_do_not_mix(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mythos.run.journal import append_event\n"
        "for i in range(200): append_event(Path(sys.argv[1]), 'failed', message='x' * 500)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, directory], env=clean_environment()) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(read_events(directory)) == 600


def test_the_environment_of_every_attempt_is_recorded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for rank in (0, 1):
        Journal(directory, rank).start(environment(["here", "there"], "cpu", "fp32", 2))
    (attempt,) = read_attempts(directory)  # by rank 0 alone
    assert (attempt["hosts"], attempt["ranks"], attempt["slurm"]["SLURM_JOB_ID"]) == (["here", "there"], 2, "7")
    assert attempt["packages"]["torch"]
    assert not RunDirectory(directory).environment.exists()


def test_the_journal_of_a_run(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    directory = tmp_path / "run"
    config = tiny_config("looped", data, directory, ranks=2, train__steps=2)
    assert two_ranks.run(run_training, config) == [0, 0]
    assert [event["event"] for event in read_events(directory)] == [STARTED, ENDED]
    (attempt,) = read_attempts(directory)
    assert (attempt["ranks"], attempt["device"], attempt["precision"]) == (2, "cpu", "fp32")
    status = read_status(directory)
    assert status.state == "finished"
    written = json.loads(RunDirectory(directory).plan.read_text(encoding="utf-8"))
    assert written["planned"]["gpus"] == 2
    assert written["measured"] == {"step_seconds": status.step_seconds, "peak_memory_gib": status.peak_memory_gib}
    assert facts(status)["step time"].endswith(f", planned {status.planned_step_seconds:.3g} s")
    assert status.planned_memory_gib == written["planned"]["peak_memory_gib"]

    shutil.rmtree(data)
    longer = tiny_config("looped", data, directory, ranks=2, train__steps=3)
    two_ranks.run(failure, longer)
    status = read_status(directory)
    assert status.state == "failed", "also when it fails before it holds the lock"
    assert "manifest.json: no such file" in str(status.cause)
    assert len(read_events(directory)) == 3, "an error that all ranks agree on is recorded once"

    held = take(directory)  # a refused attempt does not mark a run as failed that another process is training
    two_ranks.run(failure, longer)
    held.release()
    assert len(read_events(directory)) == 3

    elsewhere = tiny_config("looped", data, tmp_path / "new", ranks=2, train__steps=3)
    two_ranks.run(failure, elsewhere)
    assert not (tmp_path / "new").exists(), "a run that cannot start creates nothing"


def test_a_journal_that_cannot_be_written_does_not_hide_the_cause(directory: Path) -> None:
    def fails() -> None:
        with Journal(directory, rank=0) as journal:
            journal.start({})
            os.rename(directory, directory.with_name("gone"))
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        fails()
