"""Restarts a run until it is done, as a scheduler would, and records the cost of each attempt."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mythos.checkpoint import layout
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.cluster import clean_environment
from tests.faults import victim
from tests.spawn import Job
from tests.tiny import tiny_config

BIN = Path(sys.executable).parent
LIMIT_S = 150
STEPS = 30
SAVE_EVERY = 6
LAUNCHERS: dict[str, list[Any]] = {
    "mpiexec": [BIN / "mpiexec", "-n", "2"],
    "torchrun": [BIN / "torchrun", "--nproc-per-node=2", "--no-python"],
    "srun": ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"],
}


class Attempt(NamedTuple):
    """An attempt that has ended."""

    exit_code: int
    output: str
    ended: float
    last_step: int
    newest_checkpoint: str | None
    """The checkpoint that ``latest`` named at its end."""


class Row(NamedTuple):
    """One line of the table that the suite prints."""

    fault: str
    detected_s: float | None
    lost_steps: int
    recovered: bool


TABLE: list[Row] = []


def configuration(data: Path, directory: Path, ranks: int = 2, **overrides: Any) -> Config:
    options: dict[str, Any] = {
        "train__steps": STEPS,
        "checkpoint__every": SAVE_EVERY,
        "eval__every": 1000,
        "parallel__expert_parallel_size": ranks,
    }
    return tiny_config("looped-moe", data, directory / "run", ranks=ranks, **(options | overrides))


def attempt(
    config: Config,
    fault: dict[str, Any],
    ranks: int = 2,
    launcher: str | None = None,
    env: dict[str, str] | None = None,
    disturb: Callable[[Path], None] | None = None,
) -> Attempt:
    """Start the run once, in forked processes or by a launcher on two ranks; ``disturb`` is called after the start."""
    run_directory = Path(config.run.directory)
    directory = run_directory.parent
    file, plan, output = directory / f"config_{ranks}.yaml", directory / "fault.json", directory / "output"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    plan.write_text(json.dumps(fault), encoding="utf-8")
    output.unlink(missing_ok=True)
    words = [str(plan), "train", str(file)]
    if launcher is None:
        job = Job(ranks, victim.run, words, output=output)
        try:
            if disturb:
                disturb(run_directory)
            exit_code = job.wait(LIMIT_S)
        finally:
            job.kill()
    else:
        command = [*LAUNCHERS[launcher], sys.executable, "-m", "tests.faults.victim", *words]
        exit_code = _launch(command, env or clean_environment(), output, lambda: disturb and disturb(run_directory))
    ended = time.time()
    steps = [line["step"] for line in read_metrics(run_directory) if "train/loss" in line]
    newest = layout.latest(RunDirectory(run_directory).checkpoints)
    text = output.read_text(encoding="utf-8", errors="replace")
    return Attempt(exit_code, text, ended, max(steps, default=0), newest.name if newest else None)


def _launch(command: list[Any], env: dict[str, str], output: Path, started: Callable[[], Any]) -> int:
    with (
        output.open("wb") as file,
        subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            started()
            return process.wait(timeout=LIMIT_S)
        finally:
            # SIGTERM first: srun and mpiexec then end their tasks, which have sessions of their own.
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=10)


def resumed_at(attempt: Attempt) -> int:
    """The step from which an attempt resumed."""
    found = re.search(r"resumed from \S+ at step (\d+)", attempt.output)
    return int(found[1]) if found else 0


def lost_steps(before: Attempt, after: Attempt) -> int:
    """Steps that were done twice; all of them were done after the last complete checkpoint."""
    step = int(before.newest_checkpoint.removeprefix("step_")) if before.newest_checkpoint else 0
    assert resumed_at(after) == step, after.output
    return before.last_step - step


def losses(config: Config) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(config.run.directory)) if "train/loss" in line]


def consumed(config: Config) -> dict[int, list[str]]:
    return victim.sequences(Path(config.run.directory).parent)


def rank_log(run: Path, rank: int) -> str:
    return (run / "log" / f"rank_{rank:05d}.log").read_text(encoding="utf-8")


def process_of(run: Path, rank: int) -> int:
    return int(re.findall(r"process (\d+)", rank_log(run, rank))[-1])
