"""The faults of ``benchmarks.soak``: their kinds, and a plan of faults that depends only on the seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.damage import DAMAGE
from tests.faults.victim import CALLS_A_SAVE, CALLS_A_STEP

STEPS_A_FAULT = 16
OVER = "_over"
SAVE_EVERY = 5
RANKS = 2

IN_A_RANK: dict[str, dict[str, Any]] = {
    "kill -9 of a rank in its forward pass": {"where": "forward"},
    "kill -9 of a rank in its backward pass": {"where": "backward"},
    "kill -9 of a rank in the optimizer step": {"where": "optimizer"},
    "kill -9 of a rank while it copies its state": {"where": "snapshot"},
    "kill -9 of a rank while it writes a checkpoint": {"where": "write"},
    "kill -9 of rank 0 while it commits a checkpoint": {"where": "commit"},
    "a rank that is stopped (SIGSTOP)": {"where": "forward", "signal": "SIGSTOP"},
    "a rank that hangs": {"where": "backward", "signal": "HANG"},
    "SIGTERM to a rank": {"where": "forward", "signal": "SIGTERM"},
    "SIGTERM to a rank while it writes a checkpoint": {"where": "write", "signal": "SIGTERM"},
    "SIGTERM to rank 0 while it commits a checkpoint": {"where": "commit", "signal": "SIGTERM"},
}
"""Faults that need nothing else: what ``tests.faults.victim`` does, and where."""
KILLED_TWICE = "kill -9 of a rank, and again while the next start loads"
HANGING_SAVE = "a save that hangs, and a preemption (USR1)"
NAN = "NaN in the gradient of a rank"
PREEMPTED = "preemption (USR1 to the batch script)"
PREEMPTED_TWICE = "preemption, and again during the next start"
REQUEUED = "scontrol requeue"
CANCELLED = "scancel"
ALL_KILLED = "kill -9 of all ranks"
NODE_LOST = "a node is lost"
NODE_DOWN = "a node is set DOWN"
NODE_RESTARTED = "a node loses its ranks, but responds"
SHARDS_DAMAGED = "a flipped byte in each shard"
SHARDS_MISSING = "the shards are missing"
DISK_FULL = "the disk is full"
READ_ONLY = "the checkpoints are read-only on a node"
RUN_MISSING = "the run directory is missing"
DAMAGED = {f"kill -9 of all ranks; newest checkpoint: {name}": damage for name, damage in DAMAGE.items()}
NEED_MOUNT = (DISK_FULL, READ_ONLY)
"""Kinds that only a user who may mount file systems can cause."""
ENDS_NO_ATTEMPT = (NAN, DISK_FULL, READ_ONLY, RUN_MISSING)
"""Kinds during which the training continues."""
KINDS = (
    *IN_A_RANK,
    *(KILLED_TWICE, HANGING_SAVE, NAN, PREEMPTED, PREEMPTED_TWICE, REQUEUED, CANCELLED, ALL_KILLED),
    *(NODE_LOST, NODE_DOWN, NODE_RESTARTED, SHARDS_DAMAGED, SHARDS_MISSING, DISK_FULL, READ_ONLY, RUN_MISSING),
    *DAMAGED,
)


@dataclass(frozen=True)
class PlannedFault:
    """One fault; which of ``rank``, ``call`` and ``fraction`` it uses depends on its kind."""

    number: int
    kind: str
    step: int
    rank: int
    call: int
    fraction: float
    """Of a time, for example between the start of a job and its first step."""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.number:03d}"

    @property
    def over(self) -> str:
        """Of the file that says that the next step was done, before which the next fault does not occur."""
        return f"{self.name}{OVER}"


def plan(seed: int, faults: int, kinds: Sequence[str] = KINDS) -> list[PlannedFault]:
    """Faults in the order of their steps. No kind occurs again before every other kind has occurred as often."""
    shuffle, order = random.Random(seed), list[str]()
    while len(order) < faults:
        order += shuffle.sample(kinds, len(kinds))
    planned = []
    for number, kind in enumerate(order[:faults], start=1):
        generator = random.Random(f"{seed} {number}")
        step = number * STEPS_A_FAULT + generator.randrange(STEPS_A_FAULT // 2)
        planned.append(
            PlannedFault(number, kind, step, generator.randrange(RANKS), generator.randrange(6), generator.random())
        )
    return planned


def run_steps(faults: int) -> int:
    """The length of a run with that many faults."""
    return (faults + 1) * STEPS_A_FAULT


def rank_faults(fault: PlannedFault) -> dict[str, dict[str, Any]]:
    """File name -> content of the files with which the ranks themselves cause this fault; none for other kinds."""
    if fault.kind in IN_A_RANK:
        return {fault.name: _at(fault, **IN_A_RANK[fault.kind])}
    if fault.kind == HANGING_SAVE:
        return {fault.name: _at(fault, where="write", signal="HANG")}
    if fault.kind == KILLED_TWICE:
        load = {"where": "load", "rank": fault.rank, "call": 5 + fault.call, "after": fault.name}
        return {fault.name: _at(fault, where="backward"), f"{fault.name}_again": load}
    if fault.kind == NAN:
        return {fault.name: {"where": "nan gradient", "rank": fault.rank, "step": fault.step}}
    return {}


def _at(fault: PlannedFault, where: str, **more: Any) -> dict[str, Any]:
    calls = (CALLS_A_STEP | CALLS_A_SAVE)[where]
    rank = 0 if where == "commit" else fault.rank
    # Not in the first step of an attempt, for which the watchdog has a limit of its own, of half an hour.
    after = {"after": f"{fault.number - 1:03d}{OVER}"} if fault.number > 1 else {}
    return {"where": where, "rank": rank, "call": 1 + fault.call % calls, "from_step": fault.step} | after | more
