"""Sharded checkpoints: DeepSpeed's files plus what a run needs to go on bit for bit.

``checkpoints/step_00000100/`` holds DeepSpeed's one pair of files a rank, ``rng_rank_*.pt`` with the states of that
rank's random generators, and ``state.json``. ``checkpoints/latest`` names the newest complete one and is replaced
last, atomically. Loading unpickles: load only checkpoints that the run itself wrote.
"""

import json
import pickle
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
UNREADABLE = (OSError, EOFError, RuntimeError, AssertionError, KeyError, ValueError, pickle.UnpicklingError)
"""What torch and DeepSpeed raise for damaged files."""


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
    name = pointer.read_text(errors="replace").strip()
    found = directory / name
    if not name or not (found / STATE).is_file():
        what = f"names {name}, which is missing or incomplete" if name else "is empty"
        raise UserError(
            f"{pointer}: {what}: write the name of a complete checkpoint beside it into it, or remove it to start over"
        )
    return found


def save(engine: TrainingEngine, directory: Path, step: int, state: dict[str, Any], keep_last: int) -> None:
    """Write a checkpoint and point to it once every rank has written its files; then remove old ones. Collective."""
    target = directory / tag(step)
    if dist.get_rank() == 0 and target.exists():
        shutil.rmtree(target)  # left by a save that was killed, or by steps that were rolled back
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
    except UNREADABLE as error:
        raise _unreadable(found, error) from error
    _restore_random_states(agree(lambda: _read_random_states(found)))
    return state


def world_shape(engine: TrainingEngine) -> dict[str, int | str]:
    """What the files' layout and types depend on."""
    return {
        "ranks": dist.get_world_size(),
        "zero_stage": engine.stage,
        "expert_parallel_size": engine.expert_parallel_size,
        "precision": engine.precision,
    }


def _read_state(engine: TrainingEngine, found: Path) -> dict[str, Any]:
    try:
        state = json.loads((found / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found / STATE}: cannot be read ({error}): name another in {found.parent / POINTER}"
        ) from None
    if not isinstance(state, dict) or not {"world", "step", "data"} <= state.keys():
        raise UserError(f"{found / STATE}: damaged: name another in {found.parent / POINTER}")
    now, then = world_shape(engine), state["world"]
    if now != then:
        changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key) != now[key])
        raise UserError(f"{found}: written with another layout ({changes}): resume with the one it was written with")
    return state


def _remove_old(directory: Path, newest: Path, keep_last: int) -> None:
    """Remove complete checkpoints but the newest ones, and what killed saves have left."""
    found = [path for path in sorted(directory.glob("step_*")) if path.name <= newest.name]
    complete = [path for path in found if (path / STATE).is_file()]
    for path in found:
        if path not in complete[-keep_last:]:
            shutil.rmtree(path)


def _unreadable(found: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{found}: cannot be read ({reason}): write the name of an older checkpoint into {found.parent / POINTER}"
    )


def _read_random_states(found: Path) -> dict[str, Any]:
    try:
        return torch.load(found / _random_file(dist.get_rank()), weights_only=False)
    except UNREADABLE as error:
        raise _unreadable(found, error) from error


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
