"""Causes the faults of ``benchmarks.soak``, and mends what must be mended."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks import soak_plan as kinds
from benchmarks.soak_plan import PlannedFault, rank_faults
from benchmarks.soak_report import Cost, cost, read_records
from benchmarks.soak_run import SoakRun
from tests.cluster import bring_nodes_back
from tests.faults.damage import flip, full_disk, read_only, vanished
from tests.faults.victim import FIRED

RECENT_BYTES = 50_000
"""Of the records of steps: some hundred steps."""
STARTING_S = 6.0
"""Less than a start takes until its first step, for a second fault in it."""


def disturb(soak: SoakRun, fault: PlannedFault) -> Cost:
    """Wait for the moment of a fault, cause it, and wait until the run has done another step."""
    if rank_faults(fault):
        at = wait_for_rank_fault(soak, soak.faults / f"{fault.name}{FIRED}")
        soak.in_fault = True
        if fault.kind == kinds.HANGING_SAVE:
            soak.preempt()
        found = wait_for_next_step(soak, fault, at)
    else:
        soak.wait_for_step(fault.step)
        soak.in_fault, at = True, time.time()
        with STRIKES[fault.kind](soak, fault):
            found = wait_for_next_step(soak, fault, at)
    soak.in_fault = False
    (soak.faults / f"{fault.over}{FIRED}").touch()
    return found


def wait_for_rank_fault(soak: SoakRun, fired: Path) -> float:
    """Returns when a fault that a rank causes has occurred, in seconds since the epoch."""
    soak.wait_for(f"{fired.name}", lambda: fired.exists() and fired.stat().st_size > 0)
    return float(fired.read_text(encoding="utf-8"))


def wait_for_next_step(soak: SoakRun, fault: PlannedFault, at: float) -> Cost:
    """Returns the cost of a fault that occurred at a time, when it is known."""
    ends_attempt = fault.kind not in kinds.ENDS_NO_ATTEMPT
    found: list[Cost] = []

    def next_step_is_done() -> bool:
        each = cost(fault.kind, at, read_records(soak.directory, RECENT_BYTES), ends_attempt)
        found.extend([each] if each else [])
        return bool(found)

    soak.wait_for(f"the next step after fault {fault.number} ({fault.kind})", next_step_is_done)
    return found[0]


@contextmanager
def signal_batch(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.preempt()
    yield


@contextmanager
def signal_batch_twice(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    before = soak.printed("pretrain.sh: job ")
    soak.preempt()
    soak.wait_for("the next start", lambda: soak.printed("pretrain.sh: job ") > before)
    time.sleep(fault.fraction * STARTING_S)
    soak.preempt()
    yield


@contextmanager
def requeue(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.scontrol("requeue", soak.job.number)
    yield


@contextmanager
def cancel(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.job.scancel()
    yield


@contextmanager
def kill_all(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.kill_all()
    yield


@contextmanager
def lose_node(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.cluster("kill-node", soak.node_of(fault.rank))
    yield
    bring_nodes_back(soak.slurm)


@contextmanager
def set_node_down(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.scontrol("update", f"NodeName={soak.node_of(fault.rank)}", "State=DOWN", "Reason=soak")
    yield
    bring_nodes_back(soak.slurm)


@contextmanager
def restart_node(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    node = soak.node_of(fault.rank)
    soak.cluster("kill-node", node)
    soak.cluster("start-node", node)
    yield
    bring_nodes_back(soak.slurm)


@contextmanager
def damage_newest_checkpoint(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    soak.kill_all()
    soak.wait_until_ended()
    kinds.DAMAGED[fault.kind](soak.newest_checkpoint())
    soak.submit()
    yield


@contextmanager
def damage_shards(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    """New files take the places of the shards, so that those that are already open and checked do not change."""
    train, kept = soak.data / "train", soak.data / "kept"
    shutil.copytree(train, kept)
    for shard in train.glob("*.mds"):
        damaged = shutil.copy(shard, shard.with_suffix(".damaged"))
        flip(Path(damaged))
        os.replace(damaged, shard)
    soak.wait_until_ended()
    for shard in kept.glob("*.mds"):
        os.replace(shard, train / shard.name)
    shutil.rmtree(kept)
    soak.submit()
    yield


@contextmanager
def remove_shards(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    train, away = soak.data / "train", soak.data / "away"
    train.rename(away)
    soak.wait_until_ended()
    away.rename(train)
    soak.submit()
    yield


@contextmanager
def break_disk(soak: SoakRun, fault: PlannedFault) -> Iterator[None]:
    """Until a save has failed."""
    if fault.kind == kinds.READ_ONLY:
        break_it, mend_it = read_only(soak.run, mounts_of(soak, soak.node_of(fault.rank)))
    else:
        break_it, mend_it = full_disk(soak.run) if fault.kind == kinds.DISK_FULL else vanished(soak.run)
    before = soak.printed("not saved")
    break_it()
    try:
        soak.wait_for("a save that fails", lambda: soak.printed("not saved") > before)
    finally:
        mend_it()
    yield


def mounts_of(soak: SoakRun, node: str) -> Sequence[str]:
    """The words of a command that enters the mount namespace of a node."""
    process = Path(soak.slurm["SLURM_LOCAL_DIR"], "run", f"slurmd.{node}.pid").read_text(encoding="utf-8").strip()
    return ("nsenter", f"--mount=/proc/{process}/ns/mnt")


STRIKES: dict[str, Callable[[SoakRun, PlannedFault], AbstractContextManager[None]]] = {
    kinds.PREEMPTED: signal_batch,
    kinds.PREEMPTED_TWICE: signal_batch_twice,
    kinds.REQUEUED: requeue,
    kinds.CANCELLED: cancel,
    kinds.ALL_KILLED: kill_all,
    kinds.NODE_LOST: lose_node,
    kinds.NODE_DOWN: set_node_down,
    kinds.NODE_RESTARTED: restart_node,
    kinds.SHARDS_DAMAGED: damage_shards,
    kinds.SHARDS_MISSING: remove_shards,
    **dict.fromkeys((kinds.DISK_FULL, kinds.READ_ONLY, kinds.RUN_MISSING), break_disk),
    **dict.fromkeys(kinds.DAMAGED, damage_newest_checkpoint),
}
"""A fault begins when the block is entered, and what it broke is mended at the latest at its end."""
