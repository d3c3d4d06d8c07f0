"""The files of a run's checkpoints, and which of them count.

    checkpoints/
      latest                   the name of the newest complete checkpoint; replaced last
      step_00000100/           a complete checkpoint
        manifest.json          size and hash of every file, and which file holds which elements of a parameter
        state.json             step, samples, tokens and the rest of the run's state
        weights_00000.safetensors, optimizer_00000.safetensors    one pair for each rank that wrote it
      step_00000200.partial/   being written, or left by a run that was killed
      set_aside/               damaged and partial checkpoints that a start has found; never deleted

A directory gets its final name once all its files are on disk, and counts once ``latest`` has named it.
"""

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from mythos.checkpoint.content import wrong_tensors
from mythos.checkpoint.manifest import REMEDY, Manifest
from mythos.errors import UserError
from mythos.files import flush_directory, hash_file, open_regular, write_atomically
from mythos.readers import Count, read_json
from mythos.run.directory import (
    CHECKPOINT_NAME,
    LATEST_FILE,
    PARTIAL_SUFFIX,
    STATE_FILE,
    RunDirectory,
    checkpoint_name,
    latest_name,
)

REMOVED = ".removed"
SET_ASIDE = "set_aside"


tag = checkpoint_name


def step_of(checkpoint: Path) -> int:
    """The step in the name of a complete checkpoint."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints with a final name, newest first."""
    found = [path for path in _subdirectories(directory) if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def partial_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that are being written, or were left by a killed run."""
    return sorted(path for path in _subdirectories(directory) if path.name.endswith(PARTIAL_SUFFIX))


def latest(directory: Path) -> Path | None:
    """The checkpoint that the file ``latest`` names, even if it is missing; None if the file names none."""
    name = latest_name(directory)
    return None if name is None else directory / name


def resumable_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that a start tries, in order: the one that ``latest`` names, then the older ones, newest first.

    Checkpoints newer than the named one do not count: their save was not finished, or the user chose an older one by
    writing its name into ``latest``. If the named one is missing, all count.
    """
    named, found = latest(directory), complete_checkpoints(directory)
    if named is None or named not in found:
        return found
    return found[found.index(named) :]


def find(run: Path, step: int | None) -> Path:
    """The complete checkpoint of a run at ``step``, or its newest one. A UserError lists the steps that exist."""
    directory = RunDirectory(run).checkpoints
    found = resumable_checkpoints(directory)
    if not found:
        raise UserError(f"{run}: has no complete checkpoint: give the directory of a run that has saved one")
    if step is None:
        return found[0]
    by_step = {step_of(checkpoint): checkpoint for checkpoint in complete_checkpoints(directory)}
    if step in by_step:
        return by_step[step]
    steps = ", ".join(map(str, by_step))
    raise UserError(f"step {step}: {run} has checkpoints of steps {steps}")


def damaged_files(
    checkpoint: Path,
    manifest: Manifest,
    only: Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Read the listed files, or only some of them; returns a message for each file that is missing or damaged.

    Args:
        progress: is called with the number of bytes of each chunk that was read.
    """
    messages = {}
    for name in sorted(manifest.files if only is None else only):
        path = checkpoint / name
        try:
            message = _wrong_size(checkpoint, manifest, name)
            if message is None:
                with open_regular(path, follow_link=False) as file:
                    if hash_file(file, progress) != manifest.files[name].xxh3_64:
                        message = f"{path}: damaged, its content does not match the hash in the manifest"
            message = message or wrong_tensors(path, manifest)
            if message is not None:
                messages[name] = message
        except OSError as error:
            messages[name] = f"{path}: {error.strerror}"
    return messages


def incomplete_files(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """Like ``damaged_files`` without reading the files: finds those that are missing or have another size."""
    return {name: message for name in sorted(manifest.files) if (message := _wrong_size(checkpoint, manifest, name))}


def _wrong_size(checkpoint: Path, manifest: Manifest, name: str) -> str | None:
    path, expected = checkpoint / name, manifest.files[name].bytes
    try:
        found = path.lstat()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return f"{path}: not a regular file"
    return None if found.st_size == expected else f"{path}: {found.st_size} bytes, the manifest says {expected}"


class SavedState(TypedDict):
    """What a checkpoint's state.json holds at least; the rest is what the run saved."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    step: Count
    world: dict[str, str | int]


_SAVED_STATE: TypeAdapter[Any] = TypeAdapter(SavedState)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's state in state.json. Raises UserError if it cannot be read."""
    state: dict[str, Any] = read_json(checkpoint / STATE_FILE, _SAVED_STATE, REMEDY)
    return state


def make_current(directory: Path, chosen: Path) -> list[Path]:
    """Make ``latest`` name the checkpoint that is resumed, and set newer ones aside; returns their new paths.

    The run repeats the steps of the newer ones. If they stayed, they would count again when a later one is damaged.
    """
    write_atomically(directory / LATEST_FILE, chosen.name)
    flush_directory(directory)
    return [set_aside(path) for path in complete_checkpoints(directory) if step_of(path) > step_of(chosen)]


def set_aside(path: Path) -> Path:
    """Move a damaged or partial checkpoint to set_aside/ under a name that is free; returns its new path."""
    place = path.parent / SET_ASIDE
    place.mkdir(exist_ok=True)
    target, number = place / path.name, 1
    while target.exists():
        number += 1
        target = place / f"{path.name}.{number}"
    os.rename(path, target)
    return target


def commit(partial: Path, manifest: Manifest, check: Callable[[], None]) -> Path:
    """Give a checkpoint, all of whose files are on disk, its final name, and make ``latest`` name it.

    Args:
        check: raises OSError if the directory is no longer this run's; called before each of the two changes.

    Raises:
        OSError: the disk is full or gone. The checkpoint keeps its partial name, and the one that it would have
            replaced is back in its place.
    """
    manifest.save(partial)
    flush_directory(partial)
    check()
    final, directory = partial.with_suffix(""), partial.parent
    replaced = None
    if final.exists():  # the run has repeated these steps
        replaced = _rename_for_removal(final)
    os.rename(partial, final)
    try:
        flush_directory(directory)
        check()
        write_atomically(directory / LATEST_FILE, final.name)
    except OSError:
        os.rename(final, partial)
        if replaced is not None:
            os.rename(replaced, final)
        raise
    flush_directory(directory)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_old(directory: Path, keep_last: int, keep_every: int | None, keep: Collection[int] = ()) -> None:
    """Remove complete checkpoints except the newest ``keep_last``, those of every ``keep_every``-th step, and ``keep``.

    Checkpoints that cannot be removed now are tried again the next time.
    """
    for path in resumable_checkpoints(directory)[keep_last:]:
        if step_of(path) not in keep and not (keep_every and step_of(path) % keep_every == 0):
            with suppress(OSError):
                _rename_for_removal(path)
    for path in _subdirectories(directory):
        if path.name.endswith(REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def _rename_for_removal(path: Path) -> Path:
    """A removal that is interrupted must not leave the name of a complete checkpoint."""
    target = path.with_name(path.name + REMOVED)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(path, target)
    return target


def _subdirectories(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except OSError:  # not created yet
        return []
