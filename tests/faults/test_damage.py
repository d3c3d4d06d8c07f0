"""Damaged, truncated and missing files, full, read-only and missing disks."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from launch.cli import main
from mythos.checkpoint import layout
from mythos.checkpoint.manifest import weights_file
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import FAILED_TO_SAVE
from mythos.run.console import log
from mythos.run.directory import LATEST_FILE, RunDirectory
from mythos.run.metrics import read_metrics
from tests.cluster import clean_environment, run
from tests.faults.damage import DAMAGE, flip, full_disk, read_only, small_disk, vanished
from tests.faults.supervise import BIN, SAVE_EVERY, STEPS, TABLE, Row, configuration, consumed, losses
from tests.faults.victim import recording, sequences
from tests.require import missing
from tests.spawn import Job, RankPool
from tests.train.runs import failure, record_training, run_training

pytestmark = pytest.mark.slow
FIRST, SAVED = 18, (6, 12, 18)


@pytest.fixture(scope="module")
def straight(two_ranks: RankPool, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A finished run, and the directory of a shorter run of the same configuration, with three checkpoints."""
    directory = tmp_path_factory.mktemp("straight")
    options = {"checkpoint__keep_last": 3, "optim__cooldown": "constant"}
    straight_config = configuration(tiny_data, directory / "whole", **options)
    (directory / "whole").mkdir()
    assert two_ranks.run(record_training, straight_config, directory / "whole") == [0, 0]
    early = configuration(tiny_data, directory / "early", **options, train__steps=FIRST)
    (directory / "early").mkdir()
    assert two_ranks.run(record_training, early, directory / "early") == [0, 0]
    return straight_config, directory / "early"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    name: str, straight: tuple[Config, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    straight_config, early = straight
    shutil.copytree(early, tmp_path, dirs_exist_ok=True)
    directory = RunDirectory(tmp_path / "run").checkpoints
    newest = directory / layout.tag(FIRST)
    DAMAGE[name](newest)
    config = replace(straight_config, run=replace(straight_config.run, directory=str(tmp_path / "run")))
    (tmp_path / "run" / "config.yaml").unlink()
    shutil.copy(Path(straight_config.run.directory) / "config.yaml", tmp_path / "run" / "config.yaml")
    assert two_ranks.run(record_training, config, tmp_path) == [0, 0]
    assert losses(config) == losses(straight_config)
    assert consumed(config) == consumed(straight_config)
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text(encoding="utf-8")
    back = FIRST if "truncated pointer" in name else SAVED[-2]
    assert f"{layout.tag(back)} at step {back} of" in log
    if "pointer" not in name:
        aside = directory / layout.SET_ASIDE / newest.name
        assert aside.is_dir(), "a damaged checkpoint is never deleted"
        assert f"{newest.name} is damaged: {newest}" in log
    elif "missing directory" in name:
        assert f"{LATEST_FILE} names {newest.name}, which is missing" in log
    found = "is damaged" if "pointer" not in name else "resumed from"
    TABLE.append(Row(name, seconds_until(log, found), FIRST - back, True))


def seconds_until(log: str, text: str) -> float:
    """From the last start in a log to the first line with the text."""
    lines = log[log.rindex("rank 0 of 2 on ") - 30 :].splitlines()
    stamps = [
        datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")
        for line in lines
        if "rank 0 of 2 on" in line or text in line
    ]
    return (stamps[1] - stamps[0]).total_seconds()


def test_when_every_checkpoint_is_damaged_nothing_is_moved_and_the_start_is_refused(
    straight: tuple[Config, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    straight_config, early = straight
    shutil.copytree(early / "run", tmp_path / "run")
    shutil.copy(Path(straight_config.run.directory) / "config.yaml", tmp_path / "run" / "config.yaml")
    directory = RunDirectory(tmp_path / "run").checkpoints
    for step in SAVED:
        flip(directory / layout.tag(step) / weights_file(0))
    config = replace(straight_config, run=replace(straight_config.run, directory=str(tmp_path / "run")))
    for _ in range(2):
        messages = two_ranks.run(failure, config)
        assert messages[0] == messages[1]
        assert "every checkpoint is damaged" in messages[0]
        assert "move them away to start over" in messages[0]
    assert len(layout.complete_checkpoints(directory)) == 3
    (directory / LATEST_FILE).write_text(layout.tag(12), encoding="utf-8")
    assert f"every checkpoint up to {layout.tag(12)} is damaged" in two_ranks.run(failure, config)[0]
    (directory / LATEST_FILE).write_text(layout.tag(18), encoding="utf-8")

    done = run([BIN / "mythos", "checkpoint", "verify", tmp_path / "run"], 60, env=clean_environment())
    assert done.returncode == 2
    assert done.stdout.count("its content does not match the hash in the manifest") == 3
    evaluated = run([BIN / "mythos", "eval", tmp_path / "run"], 60)
    assert evaluated.returncode == 2
    assert f"{layout.tag(18)} is damaged: " in evaluated.stderr
    for step in SAVED:
        shutil.rmtree(directory / layout.tag(step))
    messages = two_ranks.run(failure, config)
    assert f"latest names {layout.tag(18)}, which is missing, and there is no other" in messages[0]
    assert messages[0] == messages[1]
    assert losses(config), "the metrics of the run are unchanged"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, which holds the checkpoints of a run."""
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(tmp_path / "disk", 8))
        except OSError as error:
            missing(str(error))
        yield tmp_path / "disk"


@pytest.mark.parametrize(
    ("fault", "mode"), [(full_disk, "sync"), (full_disk, "async"), (read_only, "async"), (vanished, "async")]
)
def test_training_continues_while_checkpoints_cannot_be_written(
    fault: Any, mode: str, straight: tuple[Config, Path], two_ranks: RankPool, disk: Path
) -> None:
    """The fault begins after the first checkpoint and ends after the second has failed; no step is lost."""
    config, message, detected_s = run_with_fault(fault, straight[0], two_ranks, disk, SAVE_EVERY, mode)
    assert "checkpoint of step 12 not saved (rank " in message
    assert f"last complete one: {config.run.directory}/checkpoints/step_00000006" in message
    TABLE.append(Row(f"{fault.__name__.replace('_', ' ')} during a save ({mode})", detected_s, 0, True))


def test_a_last_save_that_fails_is_repeated(straight: tuple[Config, Path], two_ranks: RankPool, disk: Path) -> None:
    """No later save is due that could replace it."""
    _, message, _ = run_with_fault(full_disk, straight[0], two_ranks, disk, STEPS - 1, "async")
    assert f"checkpoint of step {STEPS} not saved (rank " in message


def run_with_fault(
    fault: Any, straight_config: Config, two_ranks: RankPool, disk: Path, every: int, mode: str
) -> tuple[Config, str, float]:
    """Run to the end; after the first checkpoint nothing can be saved until a failure has been logged.

    Returns the configuration, the message, and the seconds from the beginning of the fault to the message.
    """
    run_directory, logged = disk / "run", disk.parent / "logged"
    config = replace(
        straight_config,
        run=replace(straight_config.run, directory=str(run_directory)),
        checkpoint=replace(straight_config.checkpoint, every=every, max_failures=10, keep_last=2, mode=mode),
    )
    break_it, mend_it = fault(run_directory)
    broken_at = 0.0

    def break_and_mend() -> None:
        nonlocal broken_at
        wait_for(lambda: layout.latest(RunDirectory(run_directory).checkpoints) is not None)
        broken_at = time.time()
        break_it()
        try:
            wait_for(logged.exists)
        finally:
            mend_it()

    thread = threading.Thread(target=break_and_mend)
    thread.start()
    assert two_ranks.run(run_slowly, config, logged, disk.parent) == [0, 0]
    thread.join()
    assert losses(config) == losses(straight_config), "no line of metrics.jsonl is lost either"
    assert sequences(disk.parent) == consumed(straight_config)
    name = "checkpoint/failures_in_a_row"
    failures = [line[name] for line in read_metrics(run_directory) if name in line]
    assert 1.0 in failures or every > SAVE_EVERY
    assert failures[-1] == 0.0
    checkpoints = RunDirectory(run_directory).checkpoints
    assert layout.latest(checkpoints) == checkpoints / layout.tag(STEPS)
    assert not layout.partial_checkpoints(checkpoints)
    return config, logged.read_text(encoding="utf-8"), logged.stat().st_mtime - broken_at


def run_slowly(config: Config, logged: Path, record: Path) -> int:
    """Train slowly enough for faults between two steps; record sequences and rank 0's message of a failed save."""
    step, error = TrainingEngine.step, log.error

    def watched(message: str) -> None:
        error(message)
        if dist.get_rank() == 0 and "not saved" in message:
            logged.write_text(message, encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "step", lambda *arguments: (time.sleep(0.1), step(*arguments))[1])
        patch.setattr(log, "error", watched)
        with recording(record):
            return run_training(config)


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_disk_that_stays_full_ends_the_run_with_code_74(tiny_data: Path, disk: Path) -> None:
    options = {"train__steps": 2000, "checkpoint__every": 20, "checkpoint__max_failures": 2}
    config = configuration(tiny_data, disk, ranks=1, **options)
    run_directory, file = disk / "run", disk.parent / "c.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    job = Job(1, main, ["train", str(file)], output=disk.parent / "output")
    try:
        wait_for(lambda: layout.latest(RunDirectory(run_directory).checkpoints) is not None)
        full_disk(run_directory)[0]()
        assert job.wait(120) == FAILED_TO_SAVE, job.text()
    finally:
        job.kill()
    assert "No space left on device" in job.text()
    assert "2 of 2 failures in a row (checkpoint.max_failures)" in job.text()
    assert f"last complete one: {run_directory}/checkpoints/step_" in job.text()
    assert "Traceback" not in job.text()
