"""Training runs on a pool of ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.ranks.preemption import StopRequest
from mythos.run.metrics import read_metrics
from mythos.train.loop import train
from tests.faults.victim import recording


def run_training(config: Config, accept: Sequence[str] = ()) -> int:
    """`mythos train` on one rank of a pool; returns the exit code."""
    return train(config, torch.device("cpu"), StopRequest(), accept)


def failure(config: Config) -> str:
    """The error with which the training run ends."""
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return "no error"


def record_training(config: Config, directory: Path, accept: Sequence[str] = ()) -> int:
    """The training run; records the sequences of every step in the directory."""
    with recording(directory):
        return run_training(config, accept)


def run_some_steps(config: Config, steps: int) -> int:
    """The training run, which receives a stop request during its last step."""
    stop, step, done = StopRequest(), TrainingEngine.step, 0

    def counted(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            stop.signal_name = "a test"
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "step", counted)
        return train(config, torch.device("cpu"), stop)


def curve(config: Config, name: str) -> list[float]:
    """A metric of every step of a run, in order."""
    return [line[name] for line in read_metrics(Path(config.run.directory)) if name in line]
