"""`mythos status` of a run whose files are damaged or were made by somebody else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from mythos.run.directory import RunDirectory, prepare
from mythos.run.journal import FAILED, STARTED, append_event
from mythos.run.metrics import MetricsWriter
from mythos.run.tensorboard import CurvePosition
from tests.tiny import tiny_config

VALUES = [None, True, -1, 10**400, 1e308, "x", "\x1b[2J", [], {}, [[]], "9" * 1000]
EVENT = {"event": STARTED, "host": "n", "command": "c", "ranks": 2, "expert_parallel_size": 1, "slurm": {}}
FAILURE = {"event": FAILED, "exit_code": 1, "rank": 0, "message": "m", "host": "n"}
LINE = {"step": 3, "train/loss": 2.5, "train/tokens": 360, "perf/tokens_per_second": 5e4, "val/loss": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    prepare(tiny_config("looped", tmp_path / "data", tmp_path / "run"), [])
    run = RunDirectory(tmp_path / "run")
    append_event(run.path, STARTED, command="c", ranks=2, slurm={"SLURM_JOB_ID": "7"})
    run.metrics.write_text(json.dumps(LINE) + "\n", encoding="utf-8")
    return run


def status(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """As JSON, after it was printed as a table and as a row, too."""
    for words in (["status", str(run.path)], ["status", str(run.path.parent)]):
        assert main(words) == 0
        assert "\x1b" not in capsys.readouterr().out
    assert main(["status", "--json", str(run.path)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_any_value_in_any_field(run: RunDirectory, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(LINE | {name: value}) + "\n" for name in LINE)
    with run.events.open("a", encoding="utf-8") as file:
        for event in (EVENT, FAILURE):
            file.writelines(json.dumps(event | {name: value}) + "\n" for name in event)
            file.write(json.dumps(event | {"slurm": {"SLURM_RESTART_COUNT": value}}) + "\n")
    run.environment.write_text(json.dumps([EVENT | {"slurm": value}, value]), encoding="utf-8")
    checkpoint = run.checkpoints / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"step": value}), encoding="utf-8")
    run.latest.write_text(checkpoint.name, encoding="utf-8")
    assert "state.json: damaged" in status(run, capsys)["problem"]


def test_what_cannot_be_read_is_named(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run.metrics, run.config):
        path.unlink()
        os.mkfifo(path)
    run.latest.write_text("../../../etc", encoding="utf-8")
    found = status(run, capsys)
    assert (found["state"], found["attempts"], found["slurm_jobs"], found["step"]) == ("killed", 1, ["7"], 0)
    for path in (run.metrics, run.config):
        assert f"{path}: not a regular file" in found["problem"]
    run.config.unlink()
    run.config.write_text("[" * 10**4, encoding="utf-8")
    assert "config.yaml: damaged (nested more than 32 deep)" in status(run, capsys)["problem"]


def test_a_message_cannot_control_the_terminal_or_forge_a_row(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    details = {"exit_code": 1, "rank": 0, "host": "\x1b]0;x\x07"}
    append_event(run.path, FAILED, **details, message="gone\x1b[2J\x9b1A\nrun2  finished")
    assert main(["status", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (state,) = (line for line in lines if line.startswith("state "))
    assert r"failed: gone\x1b[2J\x9b1A; run2  finished (rank 0 on \x1b]0;x\x07, exit code 1)" in state
    assert main(["status", str(run.path.parent / "no\x1b[2Jwhere")]) == 2
    assert r"no\x1b[2Jwhere: not a run directory" in capsys.readouterr().err


def test_pipes_in_the_place_of_files_that_are_written(run: RunDirectory) -> None:
    for path in (run.events, run.metrics):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        append_event(run.path, STARTED)
    with pytest.raises(Exception, match="metrics.jsonl: not a regular file"):
        MetricsWriter(run.path, CurvePosition(0))
