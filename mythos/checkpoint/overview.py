"""What `mythos checkpoint` prints: every checkpoint of a run with its state, and where the next start would begin."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mythos.checkpoint import layout, manifest
from mythos.errors import UserError
from mythos.run.directory import CHECKPOINT_DIRECTORY, LATEST_FILE, RunDirectory


@dataclass(frozen=True)
class Row:
    """One checkpoint. Size and time are None if it disappeared while it was listed."""

    name: str
    megabytes: float | None
    written: str | None
    state: str


@dataclass(frozen=True)
class Overview:
    """The checkpoints of a run."""

    rows: list[Row]
    problems: list[str]
    """One line for each bad file."""
    next_start: str | None
    """Where the next start would begin, unless the rows show it already."""


def list_checkpoints(run: Path) -> Overview:
    """All checkpoints, complete or not. Looks for missing files and wrong sizes, but reads no tensor data."""
    directory = _directory(run)
    problems = _problems(directory, read_files=False)
    resumed = _resumed(directory, problems)
    rows = [
        _row(checkpoint, found[0] if found else _state(checkpoint, directory, resumed))
        for checkpoint, found in problems.items()
    ]
    rows += [_row(checkpoint, "not finished") for checkpoint in layout.partial_checkpoints(directory)]
    rows += [_row(path, f"set aside: {path}") for path in sorted((directory / layout.SET_ASIDE).glob("*"))]
    return Overview(rows, [], _next_start(run, resumed, problems))


def verify_checkpoints(run: Path, step: int | None = None) -> Overview:
    """The complete checkpoints, or that of one step: each file is read and its hash compared with the manifest.

    Raises:
        UserError: there is no such checkpoint.
    """
    directory = _directory(run)
    if step is not None:
        checkpoint = layout.find(run, step)
        found = _bad_files(checkpoint, read_files=True)
        return Overview([_row(checkpoint, "damaged" if found else "valid")], found, None)
    problems = _problems(directory, read_files=True)
    resumed = _resumed(directory, problems)
    rows = [
        _row(checkpoint, "damaged" if found else f"valid, {_state(checkpoint, directory, resumed)}")
        for checkpoint, found in problems.items()
    ]
    return Overview(rows, [line for found in problems.values() for line in found], _next_start(run, resumed, problems))


def _directory(run: Path) -> Path:
    directory = RunDirectory(run).checkpoints
    if not directory.is_dir():
        raise UserError(f"{run}: not a run directory ({CHECKPOINT_DIRECTORY}/ is missing): give the directory of a run")
    return directory


def _problems(directory: Path, read_files: bool) -> dict[Path, list[str]]:
    """For each complete checkpoint, newest first, one line for each bad file."""
    return {path: _bad_files(path, read_files) for path in layout.complete_checkpoints(directory)}


def _bad_files(checkpoint: Path, read_files: bool) -> list[str]:
    check = layout.damaged_files if read_files else layout.incomplete_files
    try:
        return list(check(checkpoint, manifest.Manifest.load(checkpoint)).values())
    except UserError as error:
        return [str(error)]


def _resumed(directory: Path, problems: Mapping[Path, list[str]]) -> Path | None:
    """The checkpoint from which a start would resume, judged by these problems."""
    candidates = layout.resumable_checkpoints(directory)
    return next((path for path in candidates if not problems.get(path, ["disappeared"])), None)


def _state(checkpoint: Path, directory: Path, resumed: Path | None) -> str:
    if checkpoint == resumed:
        return "would be resumed"
    counts = checkpoint in layout.resumable_checkpoints(directory)
    return "complete" if counts else f"newer than {LATEST_FILE}, does not count"


def _next_start(run: Path, resumed: Path | None, problems: Mapping[Path, list[str]]) -> str | None:
    if resumed is None and problems:
        return f"{run}: no valid checkpoint: a start is refused until one is restored or all are moved away"
    if resumed is None:
        return f"{run}: no complete checkpoint: a start begins at step 0"
    if any(found for path, found in problems.items() if layout.step_of(path) > layout.step_of(resumed)):
        return f"{run}: the next start resumes from {resumed.name} and sets newer checkpoints aside"
    return None


def _row(checkpoint: Path, state: str) -> Row:
    try:
        megabytes = sum(entry.stat().st_size for entry in os.scandir(checkpoint) if entry.is_file()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.stat().st_mtime))
    except FileNotFoundError:  # a running job has just renamed or removed it
        return Row(checkpoint.name, None, None, "disappeared while listed")
    return Row(checkpoint.name, megabytes, written, state)
