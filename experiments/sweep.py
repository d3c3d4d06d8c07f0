"""Many small training runs on this machine's cores, through the real training loop."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos.run.metrics import read_metrics


def train_all(runs: Mapping[str, Sequence[str]], files: Sequence[str], directory: Path, processes: int) -> None:
    """Train every run (name -> overrides) to its end, each in one process; finished runs are skipped.

    A run that diverges ends early; its metrics are in its run directory like those of the others.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_join_group) as pool:
        jobs = [(list(files), [*overrides, f"run.directory={directory / name}"]) for name, overrides in runs.items()]
        for number, message in enumerate(pool.imap_unordered(_train, jobs), start=1):
            print(f"{number}/{len(jobs)} {message}", flush=True)


def last(directory: Path, name: str) -> float | None:
    """The last finite value of a metric; None if there is none."""
    values = [line[name] for line in read_metrics(directory) if line.get(name) is not None]
    return values[-1] if values else None


def _join_group() -> None:
    """Start a process group of one rank, as `mythos train` does without a launcher."""
    from mythos.ranks import group

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    import torch

    torch.set_num_threads(1)
    group.start("cpu")


def _train(job: tuple[list[str], list[str]]) -> str:
    import torch

    from mythos.config.load import load
    from mythos.errors import TrainingError
    from mythos.ranks.preemption import SIGNALS, StopRequest
    from mythos.run.console import log
    from mythos.train.loop import train

    files, overrides = job
    config = load(files, overrides)
    try:
        train(config, torch.device("cpu"), StopRequest())
        outcome: Any = "done"
    except TrainingError as error:
        outcome = error
    for handler in list(log.handlers):
        log.removeHandler(handler)
    for number in SIGNALS:  # the pool ends its workers with SIGTERM, which the run handled as a request to save
        signal.signal(number, signal.SIG_DFL)
    return f"{config.run.directory}: {outcome}"
