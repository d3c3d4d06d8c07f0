"""`mythos status` tells the truth from a run directory alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.run.directory import CONFIG_FILE, is_locked, lock, prepare
from mythos.run.events import ENDED, EVENTS_FILE, FAILED, STARTED, append_event, read_events
from mythos.run.life import Life
from mythos.run.status import TAIL_BYTES, describe, read_status
from tests.cluster import clean_environment, run
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_training

METRICS = {"train/loss": 2.5, "train/tokens": 1200.0, "perf/tokens_per_second": 60.0}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run of 20 steps of 120 tokens that stands at step 10."""
    run_directory = tmp_path / "run"
    prepare(tiny_config("looped", tmp_path / "data", run_directory), accept_changes=False)
    lines = [{"step": 0, "val/loss_depth_3": 4.0}, {"step": 9, **METRICS}, {"step": 10, **METRICS}]
    (run_directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    saved = run_directory / "checkpoints" / "step_00000008"
    saved.mkdir()
    (saved / "state.json").write_text('{"step": 8}')
    (run_directory / "checkpoints" / "latest").write_text("step_00000008\n")
    return run_directory


def test_a_run_that_goes_on(directory: Path) -> None:
    append_event(directory, STARTED)
    held = lock(directory)
    assert held is not None
    status = read_status(directory)
    assert (status.state, status.step, status.steps, status.tokens, status.loss) == ("running", 10, 20, 1200, 2.5)
    assert (status.tokens_per_second, status.seconds_left) == (60.0, 20.0), "10 steps of 120 tokens at 60 a second"
    assert (status.checkpoint, status.checkpoint_step) == ("step_00000008", 8)
    assert status.validation == {"val/loss_depth_3": 4.0}
    text = describe(status)
    assert "step        10 of 20 (50.0%)" in text
    assert re.search(r"left        20 s, done about \d{4}-", text)
    assert json.loads(status.to_json())["state"] == "running"
    held.close()
    assert read_status(directory).state == "killed", "the lock is free and nothing says how it ended"


@pytest.mark.parametrize(
    ("events", "state", "cause"),
    [
        ([], "not started", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 85})], "preempted", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 0})], "finished", None),
        ([(STARTED, {}), (ENDED, {"exit_code": 85}), (STARTED, {}), (ENDED, {"exit_code": 0})], "finished", None),
        ([(STARTED, {"host": "elsewhere"})], "silent", None),
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
                (STARTED, {}),
                (ENDED, {"exit_code": 85}),
                (FAILED, {"rank": 0, "host": "node1", "exit_code": 2, "message": "no data"}),
            ],
            "failed",
            "no data (rank 0 on node1, exit code 2)",
        ),
    ],
)
def test_how_the_last_life_ended(
    events: list[tuple[str, dict[str, object]]], state: str, cause: str | None, directory: Path
) -> None:
    for event, details in events:
        append_event(directory, event, **details)
    status = read_status(directory)
    assert (status.state, status.cause) == (state, cause)
    assert state in describe(status) or state == "silent"
    assert ("no sign of life since" in describe(status)) == (state == "silent")


def test_jobs_and_restarts_are_counted(directory: Path) -> None:
    jobs = [("7", None), ("7", "1"), ("7", "2"), ("9", None)]
    lives = [{"slurm": {"SLURM_JOB_ID": job} | ({"SLURM_RESTART_COUNT": n} if n else {})} for job, n in jobs]
    (directory / "environment.json").write_text(json.dumps([*lives, {"slurm": {}}]))
    status = read_status(directory)
    assert (status.lives, status.slurm_jobs, status.slurm_restarts) == (5, ["7", "9"], 2)
    assert "slurm jobs  7, 9 (2 restarts)" in describe(status)


def test_a_run_that_slurm_may_start_again_invites_no_second_job(directory: Path) -> None:
    environment = directory / "environment.json"
    append_event(directory, ENDED, exit_code=85)
    assert "preempted, saved: start it again to go on" in describe(read_status(directory))
    environment.write_text(json.dumps([{"slurm": {}}, {"slurm": {"SLURM_JOB_ID": "7"}}]))
    squeue = "`squeue --job=7` tells whether Slurm starts it again"
    assert f"preempted, saved: {squeue}, else start it to go on" in describe(read_status(directory))
    append_event(directory, FAILED, rank=0, host="node1", exit_code=1, message="rank 1 died without a word")
    assert f"rank 1 died without a word (rank 0 on node1, exit code 1); {squeue}" in describe(read_status(directory))
    append_event(directory, STARTED)
    assert re.search(rf"killed without a word on .*: {squeue}, else", describe(read_status(directory)))
    environment.write_text(json.dumps([{"slurm": {"SLURM_JOB_ID": "7"}}, {"slurm": {}}]))
    assert "squeue" not in describe(read_status(directory)), "the last life was no job"


def test_only_the_end_of_long_metrics_is_read(directory: Path) -> None:
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for step in range(11, 20_011):
            file.write(json.dumps({"step": step, "train/loss": 1.0, "train/tokens": 120.0 * step}) + "\n")
    assert (directory / "metrics.jsonl").stat().st_size > 2 * TAIL_BYTES
    status = read_status(directory)
    assert (status.step, status.loss) == (20_010, 1.0)
    assert status.validation == {}, "it stands at the beginning"


def test_damage_is_survived_or_named(directory: Path) -> None:
    (directory / EVENTS_FILE).write_text('{"event": "start')
    (directory / "environment.json").write_text("[{")
    (directory / "checkpoints" / "latest").write_text("step_99999999")
    (directory / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n")
    status = read_status(directory)
    assert (status.state, status.step, status.checkpoint, status.loss) == ("not started", 0, None, None)
    describe(status)
    (directory / CONFIG_FILE).write_text("train: 5")
    with pytest.raises(UserError, match="config.yaml: cannot be read"):
        read_status(directory)
    with pytest.raises(UserError, match="no run there"):
        read_status(directory / "nowhere")


def test_the_command_needs_no_torch_and_no_process(directory: Path, tmp_path: Path) -> None:
    append_event(directory, ENDED, exit_code=85)
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = run([sys.executable, "-c", code, "status", directory], 30)
    assert done.returncode == 0, done.stderr
    assert "state       preempted, saved: start it again to go on" in done.stdout
    done = run([sys.executable, "-c", code, "status", tmp_path / "none"], 30)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mythos: {tmp_path / 'none'}: no run there")


HOLD = """
import sys, time
from pathlib import Path
from mythos.run.events import STARTED, append_event
from mythos.run.directory import lock
held = lock(Path(sys.argv[1]))
append_event(Path(sys.argv[1]), STARTED)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_run_does_not_read_running_for_ever(directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_locked(directory)
        assert read_status(directory).state == "running"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    status = read_status(directory)
    assert status.state == "killed"
    assert re.search(r"killed without a word on \S+, last sign of life \d+ s ago", describe(status))


def test_lines_of_many_writers_are_whole(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mythos.run.events import append_event\n"
        "for i in range(200): append_event(Path(sys.argv[1]), 'failed', message='x' * 500)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, directory], env=clean_environment()) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(read_events(directory)) == 600


def refused(config: Config) -> str:
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_runs_own_lives(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    directory = tmp_path / "run"
    config = tiny_config("looped", data, directory, ranks=2, train__steps=2)
    assert two_ranks.run(run_training, config) == [0, 0]
    assert [event["event"] for event in read_events(directory)] == [STARTED, ENDED]
    assert read_status(directory).state == "finished"

    shutil.rmtree(data)
    longer = tiny_config("looped", data, directory, ranks=2, train__steps=3)
    two_ranks.run(refused, longer)
    status = read_status(directory)
    assert status.state == "failed", "also when it fails before it begins"
    assert "manifest.json: no such file" in str(status.cause)
    assert len(read_events(directory)) == 3, "one rank speaks for all"

    held = lock(directory)  # a run that others keep going is not failed by a start that is refused
    two_ranks.run(refused, longer)
    assert held is not None
    held.close()
    assert len(read_events(directory)) == 3

    elsewhere = tiny_config("looped", data, tmp_path / "new", ranks=2, train__steps=3)
    two_ranks.run(refused, elsewhere)
    assert not (tmp_path / "new").exists(), "a run that cannot start leaves nothing behind"


def test_a_full_disk_hides_no_cause(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos.run.life.dist.get_rank", lambda: 0)

    def fails() -> None:
        with Life(directory) as life:
            life.begin()
            os.rename(directory, directory.with_name("gone"))
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        fails()
