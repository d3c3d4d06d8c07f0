"""Finds the checkpoint from which a run resumes, and fills the engine from it on any number of ranks.

A rank reads the elements that it updates now (see ``mythos.checkpoint.reader``), whichever ranks wrote them.
"""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from mythos.checkpoint import layout
from mythos.checkpoint.manifest import Manifest, WrongFormat
from mythos.checkpoint.reader import CheckpointReader
from mythos.checkpoint.snapshot import world_shape
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.ranks.group import agree, from_rank_0
from mythos.run.console import Notices, log
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE

Progress = Callable[[str], None]
"""Called now and then during long work with what the run is doing: ``Watchdog.progress``."""
MB = 10**6
CHECK_AGAIN_AFTER_S = 2.0
"""The pause before a bad file is checked again: a network file system may have shown an outdated state."""


def unwatched(activity: str) -> None:
    """The ``Progress`` of a process without a watchdog."""


def newest_valid(directory: Path, progress: Progress = unwatched) -> Path | None:
    """The newest checkpoint whose files are all valid; None for a run without checkpoints. Collective.

    Partial and damaged checkpoints are logged and set aside, and so are those newer than the chosen one, whose steps
    the run repeats. If no checkpoint is valid, all stay where they are.

    Raises:
        UserError: all checkpoints are damaged, of another format or missing, or only rank 0 can read them.
    """
    damaged: dict[Path, str] = {}
    for candidate in from_rank_0(lambda: _set_partial_ones_aside(directory)):
        problem = _find_damage(candidate, progress)
        if problem is None:
            from_rank_0(lambda: _make_current(directory, candidate, damaged))  # noqa: B023
            return candidate
        log.error(f"{candidate.name} is damaged: {problem}")
        damaged[candidate] = problem
    if damaged:
        raise UserError(from_rank_0(lambda: _all_damaged(directory, damaged)), agreed=True)
    return None


def check(found: Path, progress: Progress = unwatched) -> None:
    """Check all files of a checkpoint. Collective.

    Raises:
        UserError: a file is damaged or missing.
    """
    if problem := _find_damage(found, progress):
        raise UserError(f"{found.name} is damaged: {problem}: choose another one", agreed=True)


def load(engine: TrainingEngine, found: Path, progress: Progress = unwatched) -> dict[str, Any]:
    """Fill the engine from a checkpoint that any number of ranks has written; returns the saved state. Collective.

    Raises:
        UserError: it belongs to another model, or cannot be read.
    """
    reader, state = agree(lambda: (CheckpointReader(found), layout.read_state(found)))
    now, then = world_shape(engine), state["world"]
    if now != then:
        changes = ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key) != now[key])
        log.info(f"{found.name} was written with another layout ({changes}): every rank reads the parts it needs")
    agree(lambda: _check_same_model(engine, reader))
    agree(lambda: _read_shards(engine, reader, progress))
    engine.refresh_weights()
    return state


def _read_shards(engine: TrainingEngine, reader: CheckpointReader, progress: Progress) -> None:
    engine.optimizer.state.clear()  # a run that goes back to a checkpoint has the state of later updates
    converted = 0
    try:
        for shard in engine.shards():
            progress(f"reading {reader.checkpoint.name}")
            reader.weights(shard.name, shard.start, shard.stop, shard.weights(shard.start, shard.stop))
            saved = reader.optimizer_state(shard.name, shard.start, shard.stop)
            shard.set_optimizer_state(saved, reader.optimizer_steps(shard.name))
            converted += bool(saved) and set(saved) != set(shard.state_names)
        engine.set_buffers(reader.buffers())
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{reader.checkpoint}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    if converted:
        log.info(
            f"{reader.checkpoint.name} was written with another optim.kind or optim.muon_beta2: {converted} parameters "
            "on this rank keep exp_avg; of their other moments, exp_avg_sq starts at its square, second_moment at 0, "
            "and those that are not used are dropped"
        )


def _check_same_model(engine: TrainingEngine, reader: CheckpointReader) -> None:
    saved = {name: parameter.shape for name, parameter in reader.manifest.parameters.items()}
    for shard in engine.shards():
        if saved.get(shard.name) != shard.shape:
            raise UserError(
                f"{reader.checkpoint}: {shard.name} is {saved.get(shard.name, 'missing')}, this model's is "
                f"{shard.shape}: give the run's own configuration"
            )


def _find_damage(checkpoint: Path, progress: Progress) -> str | None:
    """A message about the damaged files of a checkpoint; each rank checks some of the files. Collective.

    Rank 0 checks again, some seconds later, what a rank could not read: it may have been an outdated view.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    messages = agree(lambda: _damaged_files(checkpoint, lambda names: names[rank::ranks], progress))
    by_rank: list[Any] = [None] * ranks
    dist.all_gather_object(by_rank, (socket.gethostname(), messages))
    found = {name: (rank, host, text) for rank, (host, each) in enumerate(by_rank) for name, text in each.items()}
    if not found:
        return None

    def check_again() -> list[str]:
        time.sleep(CHECK_AGAIN_AFTER_S)
        bad = _damaged_files(checkpoint, lambda names: [name for name in names if name in found], progress)
        return list(bad.values())

    if again := from_rank_0(check_again):
        return again[0] + (f" and {len(again) - 1} more" if again[1:] else "")
    rank, host, text = next(iter(found.values()))
    raise UserError(
        f"{text} (rank {rank} on {host}), but rank 0 can read it: repair the file system of that host", agreed=True
    )


def _damaged_files(checkpoint: Path, choose: Callable[[list[str]], list[str]], progress: Progress) -> dict[str, str]:
    """A message for each of the chosen files that is damaged; for the manifest if that is damaged."""
    try:
        manifest = Manifest.load(checkpoint)
    except WrongFormat:
        raise
    except UserError as error:
        return {MANIFEST_FILE: str(error)}
    names, activity, done_bytes = choose(sorted(manifest.files)), f"checking {checkpoint.name}", 0
    notices = Notices(activity, sum(manifest.files[name].bytes for name in names) // MB, "MB on this rank")

    def count(chunk_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += chunk_bytes
        progress(activity)
        notices.report(done_bytes // MB)

    return layout.damaged_files(checkpoint, manifest, names, count)


def _set_partial_ones_aside(directory: Path) -> list[Path]:
    """Returns the checkpoints to try."""
    for path in layout.partial_checkpoints(directory):
        log.warning(f"{path.name} was not finished: set aside as {layout.set_aside(path)}")
    named, found = layout.latest(directory), layout.resumable_checkpoints(directory)
    if named is not None and named not in found:
        missing = f"{directory / LATEST_FILE} names {named.name}, which is missing"
        if not found:
            raise UserError(
                f"{missing}, and there is no other checkpoint: restore it, or remove {LATEST_FILE} to start over"
            )
        log.error(missing)
    return found


def _make_current(directory: Path, chosen: Path, damaged: Mapping[Path, str]) -> None:
    for path in layout.make_current(directory, chosen):
        log.error(f"set aside as {path}: {damaged.get(directory / path.name, f'newer than {chosen.name}')}")


def _all_damaged(directory: Path, damaged: Mapping[Path, str]) -> str:
    """The message when no checkpoint is left to try; ``damaged`` begins with the newest one."""
    newer = [path.name for path in layout.complete_checkpoints(directory) if path not in damaged]
    which = f"every checkpoint up to {next(iter(damaged)).name}" if newer else "every checkpoint"
    remedy = f"write {newer[-1]} into {LATEST_FILE} to resume there" if newer else "restore one"
    return f"{directory}: {which} is damaged ({'; '.join(damaged.values())}): {remedy}, or move them away to start over"
