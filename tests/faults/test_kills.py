"""Ranks that die, hang or receive a stop request at random moments of a run, which is restarted until it is done.

Most runs have no launcher that ends the other ranks: these must detect the fault themselves.
"""

import os
import random
import re
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mythos.errors import PREEMPTED
from mythos.run.metrics import read_metrics
from tests.faults.conftest import NO_FAULT
from tests.faults.supervise import (
    STEPS,
    TABLE,
    Row,
    attempt,
    configuration,
    consumed,
    losses,
    lost_steps,
    process_of,
    rank_log,
)
from tests.faults.victim import CALLS_A_SAVE, CALLS_A_STEP

pytestmark = pytest.mark.slow
Undisturbed = tuple[list[float], dict[int, list[str]]]

RANDOM = random.Random(20261123)


def moment(where: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    """A random moment between steps 7 and 25, or in one of the first three saves."""
    if where in CALLS_A_STEP:
        call = CALLS_A_STEP[where] * RANDOM.randrange(7, 25) + RANDOM.randrange(CALLS_A_STEP[where])
    else:
        call = RANDOM.randrange(1, 3 * CALLS_A_SAVE[where])
    return {"where": where, "rank": RANDOM.randrange(2) if rank is None else rank, "call": call} | more


KILLS = {
    "kill -9 of a rank in its forward pass": moment("forward"),
    "kill -9 of a rank in its backward pass": moment("backward"),
    "kill -9 of a rank in the optimizer step": moment("optimizer"),
    "kill -9 of a rank while it copies its state": moment("snapshot"),
    "kill -9 of rank 0 while it writes a checkpoint": moment("write", 0),
    "kill -9 of rank 1 while it writes a checkpoint": moment("write", 1),
    "kill -9 of rank 0 before a checkpoint gets its name": {"where": "commit", "rank": 0, "call": 4},
    "kill -9 of rank 0 before the pointer moves": {"where": "commit", "rank": 0, "call": 5},
    "kill -9 of rank 0 after the pointer has moved": {"where": "commit", "rank": 0, "call": 6},
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    name: str, undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data, tmp_path)
    first = attempt(config, KILLS[name])
    fired = fired_at(tmp_path)
    assert first.exit_code not in (0, 2, PREEMPTED), first.output
    assert f"rank {KILLS[name]['rank']} on " in first.output, "the other rank names the one that died"
    second = attempt(config, KILLS[name])
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    TABLE.append(Row(name, first.ended - fired, lost_steps(first, second), True))


@pytest.mark.parametrize(
    "name", ["kill -9 of a rank in its backward pass", "kill -9 of rank 0 before the pointer moves"]
)
def test_a_killed_rank_under_mpiexec(name: str, undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path)
    first = attempt(config, KILLS[name], launcher="mpiexec")
    fired, rank = fired_at(tmp_path), KILLS[name]["rank"]
    assert first.exit_code not in (0, 2, PREEMPTED), first.output
    # mpiexec may end the other rank before it logs anything; then mpiexec names process, host and cause itself.
    assert f"rank {rank} on " in first.output or f"PID {process_of(tmp_path / 'run', rank)} RUNNING AT" in first.output
    second = attempt(config, KILLS[name])
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    TABLE.append(Row(f"{name}, under mpiexec", first.ended - fired, lost_steps(first, second), True))


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_killed_rank_under_other_launchers(
    launcher: str, undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    """Under srun on two nodes: the other node's rank names the one that died."""
    config = configuration(tiny_data, tmp_path)
    fault = {"where": "backward", "rank": 0, "call": 15}
    first = attempt(config, fault, launcher=launcher, env=slurm_cluster)
    fired = fired_at(tmp_path)
    assert first.exit_code not in (0, 2, PREEMPTED), first.output
    log = rank_log(tmp_path / "run", 1)
    assert f"rank 0 on {host_of(tmp_path / 'run', 0)} (process " in first.output + log
    second = attempt(config, fault)
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    name = f"kill -9 of rank 0 in its backward pass, under {launcher}"
    TABLE.append(Row(name, first.ended - fired, lost_steps(first, second), True))


def test_a_nan_in_one_ranks_gradient_is_skipped_by_all(
    undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_data, tmp_path)
    only = attempt(config, {"where": "nan gradient", "rank": 1, "call": 17})
    assert only.exit_code == 0, only.output
    assert "step 17: loss or gradient not finite, update skipped (1 in a row)" in only.output
    assert losses(config)[:17] == undisturbed[0][:17]
    assert losses(config)[17:] != undisturbed[0][17:], "one update is skipped"
    assert consumed(config) == undisturbed[1]
    skipped = [line["train/skipped_steps"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert skipped == [0.0] * 16 + [1.0] * (STEPS - 16)
    detected_s = logged_at(tmp_path / "run", "not finite, update skipped") - fired_at(tmp_path)
    TABLE.append(Row("NaN in one rank's gradient (its update is skipped)", detected_s, 0, True))


def test_kill_9_of_all(undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path)
    killed_at = 0.0

    def kill_all(run: Path) -> None:
        nonlocal killed_at
        wait_for_step(run, 14)
        killed_at = time.time()
        for rank in range(2):
            os.kill(process_of(run, rank), signal.SIGKILL)

    first = attempt(config, NO_FAULT, disturb=kill_all)
    second = attempt(config, NO_FAULT)
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    TABLE.append(Row("kill -9 of all ranks", first.ended - killed_at, lost_steps(first, second), True))


def test_a_kill_while_another_layout_is_read(undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks stop; one rank resumes and is killed while it reads the checkpoint of the two."""
    term = {"where": "forward", "rank": 1, "call": 14, "signal": "SIGTERM"}
    two, one = configuration(tiny_data, tmp_path), configuration(tiny_data, tmp_path, ranks=1)
    first = attempt(two, term)
    assert first.exit_code == PREEMPTED, first.output
    assert 0 < first.last_step < STEPS
    (tmp_path / "fault.fired").unlink()
    kill = {"where": "load", "rank": 0, "call": RANDOM.randrange(5, 40)}
    second = attempt(one, kill, ranks=1)
    assert second.exit_code == -signal.SIGKILL, second.output
    fired = fired_at(tmp_path)
    third = attempt(one, kill, ranks=1)
    assert third.exit_code == 0, third.output
    assert losses(one) == pytest.approx(undisturbed[0], rel=1e-5)
    assert consumed(one) == undisturbed[1]
    name = "kill -9 while one rank reads the checkpoint of two"
    TABLE.append(Row(name, second.ended - fired, lost_steps(first, third), True))


@pytest.mark.parametrize("where", ["write", "commit", "snapshot"])
def test_sigterm_during_a_save(where: str, undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path)
    fault = moment(where, 0, signal="SIGTERM")
    first = attempt(config, fault)
    assert first.exit_code == PREEMPTED, first.output
    assert first.last_step < STEPS
    fired = fired_at(tmp_path)
    second = attempt(config, fault)
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    lost = lost_steps(first, second)
    assert lost == 0, "everything was saved before the exit"
    TABLE.append(Row(f"SIGTERM during a save ({where})", first.ended - fired, lost, True))


def test_a_save_that_hangs_is_abandoned_when_the_grace_is_over(
    undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path
) -> None:
    """Under mpiexec, which must pass on the exit code of ranks that leave without finalising MPI."""
    config = configuration(tiny_data, tmp_path, preemption__grace_s=3.0)
    fault = {"where": "write", "rank": 1, "call": CALLS_A_SAVE["write"] + 1, "signal": "HANG"}
    asked_at = 0.0

    def ask_twice(run: Path) -> None:
        nonlocal asked_at
        while not (tmp_path / "fault.fired").exists():
            time.sleep(0.02)
        asked_at = time.time()
        for _ in range(2):
            os.kill(process_of(run, 1), signal.SIGTERM)
            time.sleep(1)

    first = attempt(config, fault, launcher="mpiexec", disturb=ask_twice)
    assert first.exit_code == PREEMPTED, first.output
    assert "not saved within 3 s of the signal (preemption.grace_s)" in first.output
    second = attempt(config, fault)
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    lost = lost_steps(first, second)
    TABLE.append(Row("two SIGTERMs, and a save that hangs", first.ended - asked_at, lost, True))


def test_a_rank_that_does_not_respond(undisturbed: Undisturbed, tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(tiny_data, tmp_path, train__watchdog_s=5.0)
    fault = moment("forward", 1, signal="SIGSTOP")
    first = attempt(config, fault)
    assert first.exit_code not in (0, PREEMPTED), first.output
    assert re.search(r"no step finished for 5 s .*; no response from rank 1 on \S+ \(process \d+\)", first.output)
    log = rank_log(tmp_path / "run", 0)
    assert "the stacks of all threads" in log
    assert "mythos/train/loop.py" in log
    fired = fired_at(tmp_path)
    second = attempt(config, fault)
    assert second.exit_code == 0, second.output
    assert losses(config) == undisturbed[0]
    assert consumed(config) == undisturbed[1]
    name = "a rank that does not respond (watchdog 5 s)"
    TABLE.append(Row(name, first.ended - fired, lost_steps(first, second), True))


def wait_for_step(run: Path, step: int, limit_s: float = 120) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if any(line["step"] >= step and "train/loss" in line for line in read_metrics(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {limit_s} s")


def fired_at(directory: Path) -> float:
    """When the fault occurred, in seconds since the epoch."""
    return float((directory / "fault.fired").read_text(encoding="utf-8"))


def logged_at(run: Path, text: str) -> float:
    """When rank 0 first logged a text, in seconds since the epoch."""
    stamp = next(line[:23] for line in rank_log(run, 0).splitlines() if text in line)
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def host_of(run: Path, rank: int) -> str:
    found = re.search(rf"rank {rank} of 2 on (\S+),", rank_log(run, rank))
    assert found
    return found[1]
