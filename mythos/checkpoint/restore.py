"""How a run finds the checkpoint to resume from, and how the engine is filled from it on any number of ranks.

A rank that loads asks for the elements that it updates now (see ``mythos.checkpoint.pieces``), whichever ranks wrote
them.
"""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from mythos.checkpoint import layout
from mythos.checkpoint.pieces import PieceReader
from mythos.checkpoint.snapshot import world_shape
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.ranks.group import agree, from_rank_0
from mythos.run.console import log
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE

LOOK_AGAIN_S = 2.0
"""Before a file counts as damaged: a network file system may have known it wrongly."""


def newest_valid(directory: Path) -> Path | None:
    """The checkpoint to resume from, all of whose files were found whole; None for a run without one. Collective.

    Half-written and damaged ones are named in the log and set aside, unless no other is left, and so are those that
    are newer than the chosen one: the run takes their steps back.

    Raises:
        UserError: checkpoints are there, or were, and every one is damaged, of another format, or read by rank 0 alone.
    """
    damaged: dict[Path, str] = {}
    for candidate in from_rank_0(lambda: _tidy(directory)):
        problem = _damage(candidate)
        if problem is None:
            from_rank_0(lambda: _settle(directory, candidate, damaged))  # noqa: B023
            return candidate
        log.error(f"{candidate.name} is damaged: {problem}")
        damaged[candidate] = problem
    if damaged:
        newer = from_rank_0(lambda: [path.name for path in layout.complete(directory) if path not in damaged])
        which = f"every checkpoint up to {next(iter(damaged)).name}" if newer else "every checkpoint"
        remedy = f"write {newer[-1]} into {LATEST_FILE} to go on there" if newer else "restore one"
        what = "; ".join(damaged.values())
        raise UserError(
            f"{directory}: {which} is damaged ({what}): {remedy}, or move them away to start over", agreed=True
        )
    return None


def check(found: Path) -> None:
    """All files of a checkpoint are whole, or UserError. Collective."""
    if problem := _damage(found):
        raise UserError(f"{found.name} is damaged: {problem}: choose another one", agreed=True)


def load(engine: TrainingEngine, found: Path) -> dict[str, Any]:
    """Fill the engine from a checkpoint that any number of ranks has written; returns the saved state. Collective.

    Raises:
        UserError: it belongs to another model, or cannot be read.
    """
    reader, state = agree(lambda: (PieceReader(found), layout.read_state(found)))
    now, then = world_shape(engine), state["world"]
    if now != then:
        changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key) != now[key])
        log.info(f"{found.name} was written with another layout ({changes}): every rank reads the parts it needs")
    agree(lambda: _check_same_model(engine, reader))
    agree(lambda: _read_pieces(engine, reader))
    engine.refresh_weights()
    return state


def _read_pieces(engine: TrainingEngine, reader: PieceReader) -> None:
    engine.optimizer.state.clear()  # of the updates since, where a run goes back
    converted = 0
    try:
        for shard in engine.shards():
            reader.weights(shard.name, shard.start, shard.stop, shard.weights(shard.start, shard.stop))
            saved = reader.optimizer_state(shard.name, shard.start, shard.stop)
            shard.set_optimizer_state(saved, reader.optimizer_steps(shard.name))
            converted += bool(saved) and set(saved) != set(shard.state_names)
        engine.set_buffers(reader.buffers())
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{reader.checkpoint}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    if converted:
        log.info(
            f"{reader.checkpoint.name} was written with another optim.kind: {converted} parameters on this rank keep "
            "exp_avg, and their exp_avg_sq is dropped or starts at its square"
        )


def _check_same_model(engine: TrainingEngine, reader: PieceReader) -> None:
    saved = {name: parameter.shape for name, parameter in reader.manifest.parameters.items()}
    for shard in engine.shards():
        if saved.get(shard.name) != shard.shape:
            raise UserError(
                f"{reader.checkpoint}: {shard.name} is {saved.get(shard.name, 'missing')}, this model's is "
                f"{shard.shape}: give the run's own configuration"
            )


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, whose files the ranks share out among each other. Collective.

    What one rank cannot read is no damage yet: rank 0 looks again, some seconds later.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = agree(lambda: _problems(checkpoint, lambda names: names[rank::ranks]))
    everyones: list[Any] = [None] * ranks
    dist.all_gather_object(everyones, (socket.gethostname(), wrong))
    found = {name: (rank, host, text) for rank, (host, each) in enumerate(everyones) for name, text in each.items()}
    if not found:
        return None

    def look_again() -> list[str]:
        time.sleep(LOOK_AGAIN_S)
        return list(_problems(checkpoint, lambda names: [name for name in names if name in found]).values())

    if again := from_rank_0(look_again):
        return again[0] + (f" and {len(again) - 1} more" if again[1:] else "")
    rank, host, text = next(iter(found.values()))
    raise UserError(
        f"{text} (rank {rank} on {host}), but rank 0 reads it: mend the file system of that host", agreed=True
    )


def _problems(checkpoint: Path, choose: Callable[[list[str]], list[str]]) -> dict[str, str]:
    """What is wrong with the chosen files, by name."""
    try:
        manifest = layout.Manifest.load(checkpoint)
    except layout.WrongFormat:
        raise
    except UserError as error:
        return {MANIFEST_FILE: str(error)}
    return layout.problems(checkpoint, manifest, choose(sorted(manifest.files)))


def _tidy(directory: Path) -> list[Path]:
    for path in layout.half_written(directory):
        log.warning(f"{path.name} was not finished: set aside as {layout.set_aside(path)}")
    named, found = layout.latest(directory), layout.candidates(directory)
    if named is not None and named not in found:
        missing = f"{directory / LATEST_FILE} names {named.name}, which is missing"
        if not found:
            raise UserError(f"{missing}, and there is no other: restore it, or remove {LATEST_FILE} to start over")
        log.error(missing)
    return found


def _settle(directory: Path, chosen: Path, damaged: Mapping[Path, str]) -> None:
    for path in layout.settle(directory, chosen):
        log.error(f"set aside as {path}: {damaged.get(directory / path.name, f'newer than {chosen.name}')}")
