"""`mythos checkpoint list|verify`: the checkpoints of a run, and the one from which the next start resumes."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from launch.arguments import Run
from launch.table import Column, print_table
from mythos.checkpoint import layout
from mythos.errors import BAD_INPUT, DONE, UserError
from mythos.run.directory import CHECKPOINT_DIRECTORY, LATEST_FILE, RunDirectory

COLUMNS = (Column("checkpoint"), Column("size", is_number=True), Column("written"), Column("state"))


def run_list(run: Run) -> int:
    """List steps and sizes, and which checkpoint would be resumed.

    Reads no tensor data; `verify` does.
    """
    directory = _directory(run)
    problems = {checkpoint: _problems(checkpoint, layout.missing) for checkpoint in layout.complete(directory)}
    resumed = _resumed(directory, problems)
    rows = [
        _row(checkpoint, found[0] if found else _state(checkpoint, directory, resumed))
        for checkpoint, found in problems.items()
    ]
    rows += [_row(checkpoint, "not finished") for checkpoint in layout.half_written(directory)]
    rows += [
        _row(checkpoint, f"set aside: {checkpoint}") for checkpoint in sorted((directory / layout.SET_ASIDE).glob("*"))
    ]
    print_table(COLUMNS, rows)
    _print_next_start(run, resumed, problems)
    return DONE


def run_verify(run: Run) -> int:
    """Read every file and compare its hash with the manifest.

    Exit code 2 if a file is damaged.
    """
    directory = _directory(run)
    problems = {checkpoint: _problems(checkpoint, layout.problems) for checkpoint in layout.complete(directory)}
    resumed = _resumed(directory, problems)
    print_table(
        COLUMNS,
        [
            _row(checkpoint, "damaged" if found else f"valid, {_state(checkpoint, directory, resumed)}")
            for checkpoint, found in problems.items()
        ],
    )
    for found in problems.values():
        for problem in found:
            print(problem)
    _print_next_start(run, resumed, problems)
    return BAD_INPUT if any(problems.values()) else DONE


def _problems(checkpoint: Path, find: Callable[[Path, layout.Manifest], dict[str, str]]) -> list[str]:
    """One line for each bad file."""
    try:
        return list(find(checkpoint, layout.Manifest.load(checkpoint)).values())
    except UserError as error:
        return [str(error)]


def _resumed(directory: Path, problems: Mapping[Path, list[str]]) -> Path | None:
    """The checkpoint from which a start would resume, judged by these problems."""
    return next((path for path in layout.candidates(directory) if not problems.get(path, ["gone"])), None)


def _state(checkpoint: Path, directory: Path, resumed: Path | None) -> str:
    if checkpoint == resumed:
        return "would be resumed"
    return "complete" if checkpoint in layout.candidates(directory) else f"newer than {LATEST_FILE}, does not count"


def _print_next_start(run: Path, resumed: Path | None, problems: Mapping[Path, list[str]]) -> None:
    """Where the next start would begin, unless the table has made that clear."""
    if resumed is None and problems:
        print(f"{run}: no valid checkpoint: a start is refused until one is restored or all are moved away")
    elif resumed is None:
        print(f"{run}: no complete checkpoint: a start begins at step 0")
    elif any(found for path, found in problems.items() if layout.step_of(path) > layout.step_of(resumed)):
        print(f"{run}: the next start resumes from {resumed.name} and sets newer checkpoints aside")


def _directory(run: Path) -> Path:
    if not (RunDirectory(run).checkpoints).is_dir():
        raise UserError(f"{run}: no run directory, {CHECKPOINT_DIRECTORY}/ is missing: give the directory of a run")
    return RunDirectory(run).checkpoints


def _row(checkpoint: Path, state: str) -> tuple[str, str, str, str]:
    try:
        megabytes = sum(entry.stat().st_size for entry in os.scandir(checkpoint) if entry.is_file()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.stat().st_mtime))
    except FileNotFoundError:  # a running job has just renamed or removed it
        return checkpoint.name, "", "", "disappeared while listed"
    return checkpoint.name, f"{megabytes:,.1f} MB", written, state
