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


def curve(config: Config, name: str) -> list[float]:
    """A metric of every step of a run, in order."""
    return [line[name] for line in read_metrics(Path(config.run.directory)) if name in line]
