"""Starts a run again until it is done, as a scheduler would, and says what every life of it cost."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mythos.checkpoint import layout
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.cluster import clean_environment, run
from tests.faults.victim import sequences
from tests.tiny import tiny_config

BIN = Path(sys.executable).parent
LIMIT_S = 150
STEPS = 30
SAVE_EVERY = 6


class Life(NamedTuple):
    exit_code: int
    output: str
    ended: float
    last_step: int
    named: str | None
    """What ``latest`` named when it had ended."""


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


LAUNCHERS: dict[str, list[Any]] = {
    "bare": [],
    "mpiexec": [BIN / "mpiexec", "-n", "2"],
    "torchrun": [BIN / "torchrun", "--nproc-per-node=2", "--no-python"],
    "srun": ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"],
}


def live(
    config: Config,
    fault: dict[str, Any],
    ranks: int = 2,
    launcher: str | None = None,
    env: dict[str, str] | None = None,
    poke: Callable[[Path], None] | None = None,
) -> Life:
    """One life of the run, under mpiexec or bare by default; ``poke`` is called once it is on its way."""
    directory = Path(config.run.directory).parent
    file, plan = directory / f"config_{ranks}.yaml", directory / "fault.json"
    file.write_text(yaml.safe_dump(to_dict(config)))
    plan.write_text(json.dumps(fault))
    start = LAUNCHERS[launcher or ("mpiexec" if ranks > 1 else "bare")]
    command = [*start, sys.executable, "-m", "tests.faults.victim", plan, "train", file]
    if poke is None:
        done = run(command, LIMIT_S, env=env or clean_environment())
        code, output = done.returncode, done.stdout + done.stderr
    else:
        with subprocess.Popen(
            command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                poke(Path(config.run.directory))
                output, _ = process.communicate(timeout=LIMIT_S)
            finally:
                process.kill()
            code = process.returncode
    ended = time.time()
    run_directory = Path(config.run.directory)
    steps = [line["step"] for line in read_metrics(run_directory) if "train/loss" in line]
    named = layout.latest(RunDirectory(run_directory).checkpoints)
    return Life(code, output, ended, max(steps, default=0), named.name if named else None)


def resumed_at(life: Life) -> int:
    """The step at which a life began."""
    found = re.search(r"resumed from \S+ at step (\d+)", life.output)
    return int(found[1]) if found else 0


def lost_steps(before: Life, after: Life) -> int:
    """Steps that were done twice; all of them were done after the last complete checkpoint."""
    step = int(before.named.removeprefix("step_")) if before.named else 0
    assert resumed_at(after) == step, after.output
    return before.last_step - step


def losses(config: Config) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(config.run.directory)) if "train/loss" in line]


def consumed(config: Config) -> dict[int, list[str]]:
    return sequences(Path(config.run.directory).parent)
