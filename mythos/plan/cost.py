"""What a run costs: days, GPU hours, money, checkpoints, and what failures take.

The best interval between checkpoints is sqrt(2 d M) (Young 1974), where d is how long a checkpoint stops the training
and M the mean time between failures; with Daly's correction (2006) it is sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3) - d.
Goodput is the share of the time that is left for training: 1 - d/t - (t/2 + restart)/M for an interval t.
"""

import math
from dataclasses import dataclass

from mythos.config.schema import Config
from mythos.plan.cluster import Cluster
from mythos.plan.layout import Layout
from mythos.plan.memory import checkpoint_bytes, snapshot_bytes

HOUR_S = 3600
DAY_S = 86400


@dataclass(frozen=True)
class Cost:
    """Of a whole run, with the time that failures take."""

    days: float
    gpu_hours: float
    dollars: float
    checkpoint_bytes: float
    save_seconds: float
    """Until a checkpoint is on the disk."""
    stall_seconds: float
    """While which training waits: for the copy to host memory, or for the whole save."""
    best_interval_seconds: float
    best_interval_steps: int
    hours_between_failures: float
    goodput: float
    """With the interval of the configuration."""
    best_goodput: float


def cost(config: Config, layout: Layout, cluster: Cluster, step_seconds: float) -> Cost:
    """The cost of a run with steps of this length."""
    size = checkpoint_bytes(config)
    save = size / min(cluster.storage_bandwidth, cluster.copy_to_host_bandwidth * layout.ranks)
    stall = (
        snapshot_bytes(config, layout) / cluster.copy_to_host_bandwidth if config.checkpoint.mode == "async" else save
    )
    failures_s = cluster.gpu_hours_between_failures / layout.ranks * HOUR_S
    # A checkpoint begins only when the one before is on the disk.
    best = max(best_interval(stall, failures_s), save, step_seconds)
    interval = max(config.checkpoint.every * step_seconds, save)
    share = goodput(interval, stall, failures_s, cluster.restart_s)
    training_s = config.train.steps * step_seconds
    seconds = training_s / share if share > 0 else math.inf
    gpu_hours = seconds * layout.ranks / HOUR_S
    return Cost(
        days=seconds / DAY_S,
        gpu_hours=gpu_hours,
        dollars=gpu_hours * cluster.dollars_per_gpu_hour,
        checkpoint_bytes=size,
        save_seconds=save,
        stall_seconds=stall,
        best_interval_seconds=best,
        best_interval_steps=max(1, round(best / step_seconds)),
        hours_between_failures=failures_s / HOUR_S,
        goodput=share,
        best_goodput=goodput(best, stall, failures_s, cluster.restart_s),
    )


def best_interval(stall_s: float, failures_s: float) -> float:
    """Seconds of training between two checkpoints."""
    if stall_s >= 2 * failures_s:
        return failures_s
    return math.sqrt(2 * stall_s * failures_s) * (1 + math.sqrt(stall_s / (2 * failures_s)) / 3) - stall_s


def goodput(interval_s: float, stall_s: float, failures_s: float, restart_s: float) -> float:
    """Share of the time that is left for training; 0 where failures take all of it."""
    return max(0.0, 1 - stall_s / (interval_s + stall_s) - (interval_s / 2 + restart_s) / failures_s)
