"""What a checkpoint is on disk, and which one counts.

    checkpoints/
      latest                   the name of the newest complete checkpoint; replaced last
      step_00000100/           a complete checkpoint
        manifest.json          every file with size and hash, every parameter with the files that hold its pieces
        state.json             where the run stands
        weights_00000.safetensors, optimizer_00000.safetensors    one pair a rank that wrote it
      step_00000200.partial/   being written, or left by a run that was killed
      set_aside/               damaged and half-written checkpoints that a start has found; never deleted

A directory gets its final name once all its files are on disk, and counts once ``latest`` has named it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mythos.errors import UserError
from mythos.files import flush_directory, hash_file, write_atomically
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE, STATE_FILE, RunDirectory

FORMAT_VERSION = 1
PARTIAL = ".partial"
REMOVED = ".removed"
SET_ASIDE = "set_aside"
_COMPLETE = re.compile(r"step_(\d{8,})")


class Written(NamedTuple):
    """What a file must be, to be whole."""

    bytes: int
    xxh3_64: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: its whole shape, and (file, start, stop, optimizer steps) of each of its pieces."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int, int, float], ...]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. Piece ``n`` lies in files ``weights_n`` and ``optimizer_n``, elements start to stop
    of the flattened parameter."""

    step: int
    files: dict[str, Written]
    parameters: dict[str, Parameter]

    @property
    def bytes(self) -> int:
        """Size of all listed files."""
        return sum(file.bytes for file in self.files.values())

    def save(self, directory: Path) -> None:
        """Write manifest.json with a hash of its own content."""
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        write_atomically(directory / MANIFEST_FILE, json.dumps(content | {"xxh3_64": _digest(content)}))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read manifest.json.

        Raises:
            UserError: it is missing, damaged, or of another format.
        """
        path = directory / MANIFEST_FILE
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if not isinstance(content, dict) or content.pop("xxh3_64", None) != _digest(content):
            raise UserError(f"{path}: damaged, its content does not fit its hash")
        if content["format_version"] != FORMAT_VERSION:
            raise WrongFormat(
                f"{path}: format_version {content['format_version']}, this Mythos reads {FORMAT_VERSION}: "
                "use the Mythos that wrote it"
            )
        return cls(
            step=content["step"],
            files={name: Written(*written) for name, written in content["files"].items()},
            parameters={
                name: Parameter(tuple(entry["shape"]), tuple(tuple(piece) for piece in entry["pieces"]))
                for name, entry in content["parameters"].items()
            },
        )


def weights_file(number: int) -> str:
    """Name of the file with the weights that one rank wrote."""
    return f"weights_{number:05d}.safetensors"


def optimizer_file(number: int) -> str:
    """Name of the file with the optimizer state that one rank wrote."""
    return f"optimizer_{number:05d}.safetensors"


def tag(step: int) -> str:
    """Directory name of the checkpoint after ``step`` updates."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a complete checkpoint."""
    match = _COMPLETE.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def complete(directory: Path) -> list[Path]:
    """The checkpoints with a final name, newest first."""
    found = [path for path in _listed(directory) if _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def half_written(directory: Path) -> list[Path]:
    """What saves that were killed have left."""
    return sorted(path for path in _listed(directory) if path.name.endswith(PARTIAL))


def latest(directory: Path) -> Path | None:
    """The checkpoint that the pointer names, whether it is there or not; None without a pointer that names one."""
    try:
        name = (directory / LATEST_FILE).read_text(errors="replace").strip()
    except OSError:
        return None
    return directory / name if _COMPLETE.fullmatch(name) else None


def candidates(directory: Path) -> list[Path]:
    """What a start tries, in this order: the checkpoint that ``latest`` names, then the older ones, newest first.

    Newer ones than the named one do not count: their save was not finished, or the user has gone back by writing
    another name into ``latest``. Where the named one is not there, all count.
    """
    named, found = latest(directory), complete(directory)
    if named is None or named not in found:
        return found
    return found[found.index(named) :]


def find(run: Path, step: int | None) -> Path:
    """The complete checkpoint of a run at ``step``, or its newest one. A UserError lists the steps that exist."""
    directory = RunDirectory(run).checkpoints
    found = candidates(directory)
    if not found:
        raise UserError(f"{run}: has no complete checkpoint: give the directory of a run that has saved one")
    if step is None:
        return found[0]
    for checkpoint in complete(directory):
        if step_of(checkpoint) == step:
            return checkpoint
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found)
    raise UserError(f"step {step}: {run} has checkpoints of steps {steps}")


class WrongFormat(UserError):
    """A checkpoint that another version of Mythos wrote: not damaged."""


def problems(checkpoint: Path, manifest: Manifest, only: Iterable[str] | None = None) -> dict[str, str]:
    """What is wrong with the listed files, or with some of them: one line for the name of each bad one."""
    found = {}
    for name in sorted(manifest.files if only is None else only):
        path = checkpoint / name
        try:
            if wrong := _wrong_size(checkpoint, manifest, name):
                found[name] = wrong
            elif hash_file(path) != manifest.files[name].xxh3_64:
                found[name] = f"{path}: damaged, its content does not fit the hash in the manifest"
        except OSError as error:
            found[name] = f"{path}: {error.strerror}"
    return found


def missing(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """As ``problems``, without reading the files: those that are not there, or have another size."""
    return {name: found for name in sorted(manifest.files) if (found := _wrong_size(checkpoint, manifest, name))}


def _wrong_size(checkpoint: Path, manifest: Manifest, name: str) -> str | None:
    path, expected = checkpoint / name, manifest.files[name].bytes
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if size == expected else f"{path}: {size} bytes, the manifest says {expected}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Where the run stood. Raises UserError when it cannot be read."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE_FILE}: cannot be read ({error})") from error


def settle(directory: Path, chosen: Path) -> list[Path]:
    """Make ``latest`` name the checkpoint that is resumed, and set newer ones aside; returns their new places.

    They belong to steps that the run takes back: left in their places, they would count again after a damage.
    """
    write_atomically(directory / LATEST_FILE, chosen.name)
    flush_directory(directory)
    return [set_aside(path) for path in complete(directory) if step_of(path) > step_of(chosen)]


def set_aside(path: Path) -> Path:
    """Move a damaged or half-written checkpoint out of the way, under a name that is free; returns its new place."""
    place = path.parent / SET_ASIDE
    place.mkdir(exist_ok=True)
    target, number = place / path.name, 1
    while target.exists():
        number += 1
        target = place / f"{path.name}.{number}"
    os.rename(path, target)
    return target


def commit(partial: Path, manifest: Manifest) -> Path:
    """Give a checkpoint, all of whose files are on disk, its final name, and point to it.

    Raises:
        OSError: the disk is full or gone; the checkpoint has its old name, and what it would replace is in its place.
    """
    manifest.save(partial)
    flush_directory(partial)
    final, directory = partial.with_suffix(""), partial.parent
    replaced = None
    if final.exists():  # of steps that were rolled back
        replaced = _out_of_use(final)
    os.rename(partial, final)
    try:
        flush_directory(directory)
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


def remove_old(directory: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove complete checkpoints but the newest ``keep_last``, and those of every ``keep_every``-th step.

    What cannot be removed now is tried again the next time.
    """
    for path in candidates(directory)[keep_last:]:
        if not (keep_every and step_of(path) % keep_every == 0):
            with suppress(OSError):
                _out_of_use(path)
    for path in _listed(directory):
        if path.name.endswith(REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def _out_of_use(path: Path) -> Path:
    """Renamed first, so that what a kill leaves half removed has not the name of a complete checkpoint."""
    target = path.with_name(path.name + REMOVED)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(path, target)
    return target


def _listed(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except OSError:  # not there yet
        return []


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True))
