"""`mythos checkpoint list|verify RUN`: what a run has saved, whether it is whole, and what would be resumed."""

import argparse
import time
from pathlib import Path
from typing import Any

from mythos.checkpoint import layout
from mythos.errors import BAD_INPUT, DONE, UserError


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
    candidates = layout.candidates(directory)
    for checkpoint in layout.complete(directory):
        if checkpoint in candidates:
            state = "would be resumed" if checkpoint == candidates[0] else "complete"
        else:
            state = f"newer than {layout.POINTER}, does not count"
        print(_line(checkpoint, state))
    for checkpoint in layout.half_written(directory):
        print(_line(checkpoint, "not finished"))
    for checkpoint in sorted((directory / layout.SET_ASIDE).glob("*")):
        print(_line(checkpoint, f"set aside: {checkpoint}"))
    if not candidates:
        print(f"{arguments.directory}: no complete checkpoint: a start begins at step 0")
    return DONE


def run_verify(arguments: argparse.Namespace) -> int:
    """Print a line for each checkpoint, and one for each damaged file."""
    directory, damaged = _directory(arguments.directory), 0
    for checkpoint in layout.complete(directory):
        try:
            found = list(layout.problems(checkpoint, layout.Manifest.load(checkpoint)).values())
        except UserError as error:
            found = [str(error)]
        damaged += bool(found)
        print(_line(checkpoint, "damaged" if found else "whole"))
        for problem in found:
            print(f"  {problem}")
    if damaged:
        print(f"{damaged} damaged: the next start sets them aside and resumes from the newest whole one")
    return BAD_INPUT if damaged else DONE


def _directory(run: Path) -> Path:
    if not (run / layout.DIRECTORY).is_dir():
        raise UserError(f"{run}: no run directory, {layout.DIRECTORY}/ is missing: give the directory of a run")
    return run / layout.DIRECTORY


def _line(checkpoint: Path, state: str) -> str:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.stat().st_mtime))
    return f"{checkpoint.name:<22} {megabytes:>12,.1f} MB  {written}  {state}"
