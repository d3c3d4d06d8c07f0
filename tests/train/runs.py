"""Whole training runs on a pool of ranks."""

from pathlib import Path

import torch

from mythos.config.schema import Config
from mythos.metrics.writer import read_metrics
from mythos.train.loop import train
from mythos.train.preemption import StopRequest


def run_training(config: Config, accept_changes: bool = False) -> int:
    """The real training run, on one rank of a pool; returns the exit code."""
    return train(config, torch.device("cpu"), StopRequest(), accept_changes)


class StopAfter:
    """Asks to stop after some steps; the training loop looks once a step."""

    signal_name = "a test"

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @property
    def asked(self) -> bool:
        """Counts down."""
        self.steps -= 1
        return self.steps <= 0


def run_some_steps(config: Config, steps: int) -> int:
    """The real training run, preempted after so many steps."""
    return train(config, torch.device("cpu"), StopAfter(steps))  # type: ignore[arg-type]


def curve(config: Config, name: str) -> list[float]:
    """A metric of every step of a run, in order."""
    return [line[name] for line in read_metrics(Path(config.run.directory)) if name in line]
