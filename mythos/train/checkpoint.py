"""Sharded checkpoints: DeepSpeed's files plus what a run needs to go on bit for bit.

``checkpoints/step_00000100/`` holds DeepSpeed's one pair of files a rank, ``rng_rank_*.pt`` with the states of that
rank's random generators, and ``state.json``. ``checkpoints/latest`` names the newest complete one and is replaced
last, atomically. Loading unpickles: load only checkpoints that the run itself wrote.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mythos.errors import UserError
from mythos.files import write_atomically
from mythos.train.distributed import agree
from mythos.train.engine import TrainingEngine

POINTER = "latest"
STATE = "state.json"


def tag(step: int) -> str:
    """Directory name of the checkpoint after ``step`` updates."""
    return f"step_{step:08d}"


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none yet.

    Raises:
        UserError: the pointer names a checkpoint that is not there or not complete.
    """
    pointer = directory / POINTER
    if not pointer.exists():
        return None
    found = directory / pointer.read_text().strip()
    if not (found / STATE).is_file():
        raise UserError(
            f"{pointer}: names {found.name}, which is missing or incomplete: write the name of a complete checkpoint "
            f"in {directory} into it, or remove it to start over"
        )
    return found


def save(engine: TrainingEngine, directory: Path, step: int, state: dict[str, Any], keep_last: int) -> None:
    """Write a checkpoint and point to it once every rank has written its files; then remove old ones. Collective."""
    target = directory / tag(step)
    if dist.get_rank() == 0 and target.exists():
        shutil.rmtree(target)  # left by a save that was killed: the pointer never names it
    dist.barrier()
    engine.deepspeed.save_checkpoint(str(directory), tag=tag(step), save_latest=False)
    torch.save(_random_states(), target / _random_file(dist.get_rank()))
    dist.barrier()
    if dist.get_rank() == 0:
        shape = {"world": world_shape(engine), "step": step}
        write_atomically(target / STATE, json.dumps(state | shape, indent=2))
        write_atomically(directory / POINTER, target.name)
        _remove_old(directory, target, keep_last)
    dist.barrier()


def load(engine: TrainingEngine, found: Path) -> dict[str, Any]:
    """Restore weights, optimizer, balance biases and random states; returns the saved state. Collective.

    Raises:
        UserError: the checkpoint was written by another number of ranks or another sharding, or cannot be read.
    """
    state = agree(lambda: _read_state(engine, found))
    try:
        engine.deepspeed.load_checkpoint(str(found.parent), tag=found.name)
        states = torch.load(found / _random_file(dist.get_rank()), weights_only=False)
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{found}: cannot be read ({' '.join(str(error).split())[:200]}): write the name of an older checkpoint "
            f"into {found.parent / POINTER}"
        ) from error
    _restore_random_states(states)
    return state


def world_shape(engine: TrainingEngine) -> dict[str, int]:
    """What the files' layout depends on."""
    return {
        "ranks": dist.get_world_size(),
        "zero_stage": engine.stage,
        "expert_parallel_size": engine.expert_parallel_size,
    }


def _read_state(engine: TrainingEngine, found: Path) -> dict[str, Any]:
    try:
        state = json.loads((found / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found / STATE}: cannot be read ({error}): name another in {found.parent / POINTER}"
        ) from None
    now, then = world_shape(engine), state["world"]
    if now != then:
        changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key) != now[key])
        raise UserError(f"{found}: written with another layout ({changes}): resume with the one it was written with")
    return state


def _remove_old(directory: Path, newest: Path, keep_last: int) -> None:
    complete = sorted(found.parent for found in directory.glob(f"step_*/{STATE}") if found.parent.name <= newest.name)
    for old in complete[:-keep_last]:
        shutil.rmtree(old)


def _random_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.pt"


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
