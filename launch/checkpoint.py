"""`mythos checkpoint list|verify RUN`: what a run has saved, whether it is whole, and what would be resumed."""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mythos.checkpoint import layout
from mythos.errors import BAD_INPUT, DONE, UserError
from mythos.run.directory import CHECKPOINT_DIRECTORY, LATEST_FILE, RunDirectory


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("checkpoint", help="list or verify the checkpoints of a run")
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="COMMAND")
    for name, function, text in (
        ("list", run_list, "steps, sizes, and what would be resumed; reads no data"),
        ("verify", run_verify, "read every file and compare its hash; exit code 2 when something is damaged"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
        command.set_defaults(run=function)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a line for each checkpoint."""
    directory = _directory(arguments.directory)
    problems = {checkpoint: _problems(checkpoint, layout.missing) for checkpoint in layout.complete(directory)}
    resumed = _resumed(directory, problems)
    for checkpoint, found in problems.items():
        print(_line(checkpoint, found[0] if found else _state(checkpoint, directory, resumed)))
    for checkpoint in layout.half_written(directory):
        print(_line(checkpoint, "not finished"))
    for checkpoint in sorted((directory / layout.SET_ASIDE).glob("*")):
        print(_line(checkpoint, f"set aside: {checkpoint}"))
    _tell_start(arguments.directory, resumed, problems)
    return DONE


def run_verify(arguments: argparse.Namespace) -> int:
    """Print a line for each checkpoint, and one for each damaged file."""
    directory = _directory(arguments.directory)
    problems = {checkpoint: _problems(checkpoint, layout.problems) for checkpoint in layout.complete(directory)}
    resumed = _resumed(directory, problems)
    for checkpoint, found in problems.items():
        print(_line(checkpoint, "damaged" if found else f"whole, {_state(checkpoint, directory, resumed)}"))
        for problem in found:
            print(f"  {problem}")
    _tell_start(arguments.directory, resumed, problems)
    return BAD_INPUT if any(problems.values()) else DONE


def _problems(checkpoint: Path, look: Callable[[Path, layout.Manifest], dict[str, str]]) -> list[str]:
    """A line for each bad file."""
    try:
        return list(look(checkpoint, layout.Manifest.load(checkpoint)).values())
    except UserError as error:
        return [str(error)]


def _resumed(directory: Path, problems: Mapping[Path, list[str]]) -> Path | None:
    """What a start would take, as far as these problems tell."""
    return next((path for path in layout.candidates(directory) if not problems.get(path, ["gone"])), None)


def _state(checkpoint: Path, directory: Path, resumed: Path | None) -> str:
    if checkpoint == resumed:
        return "would be resumed"
    return "complete" if checkpoint in layout.candidates(directory) else f"newer than {LATEST_FILE}, does not count"


def _tell_start(run: Path, resumed: Path | None, problems: Mapping[Path, list[str]]) -> None:
    """Where the next start would begin, if it is not plain from the list."""
    if resumed is None and problems:
        print(f"{run}: no whole checkpoint that counts: a start is refused until one is restored or all are moved away")
    elif resumed is None:
        print(f"{run}: no complete checkpoint: a start begins at step 0")
    elif any(found for path, found in problems.items() if layout.step_of(path) > layout.step_of(resumed)):
        print(f"{run}: the next start sets aside what is newer than {resumed.name}, and goes on there")


def _directory(run: Path) -> Path:
    if not (RunDirectory(run).checkpoints).is_dir():
        raise UserError(f"{run}: no run directory, {CHECKPOINT_DIRECTORY}/ is missing: give the directory of a run")
    return RunDirectory(run).checkpoints


def _line(checkpoint: Path, state: str) -> str:
    try:
        megabytes = sum(entry.stat().st_size for entry in os.scandir(checkpoint) if entry.is_file()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.stat().st_mtime))
    except FileNotFoundError:  # the run has just given it its name, or removed it
        return f"{checkpoint.name:<22} gone meanwhile"
    return f"{checkpoint.name:<22} {megabytes:>12,.1f} MB  {written}  {state}"
