"""`mythos checkpoint list|verify`: the checkpoints of a run, and the one from which the next start resumes."""

from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import Run
from launch.table import Column, print_table
from mythos.errors import BAD_INPUT, DONE, printable

if TYPE_CHECKING:
    from mythos.checkpoint.overview import Overview

VerifiedStep = Annotated[
    int | None, typer.Option("--step", metavar="N", min=0, help="only the checkpoint of this step (default: all)")
]
COLUMNS = (Column("checkpoint"), Column("size", is_number=True), Column("written"), Column("state"))


def run_list(run: Run) -> int:
    """List steps and sizes, and which checkpoint would be resumed.

    Reads no tensor data; `verify` does.
    """
    from mythos.checkpoint.overview import list_checkpoints

    _print(list_checkpoints(run))
    return DONE


def run_verify(run: Run, step: VerifiedStep = None) -> int:
    """Read every file and compare its hash with the manifest.

    Exit code 2 if a file is damaged.
    """
    from mythos.checkpoint.overview import verify_checkpoints

    overview = verify_checkpoints(run, step)
    _print(overview)
    return BAD_INPUT if overview.problems else DONE


def _print(overview: "Overview") -> None:
    print_table(
        COLUMNS,
        [
            (row.name, "" if row.megabytes is None else f"{row.megabytes:,.1f} MB", row.written or "", row.state)
            for row in overview.rows
        ],
    )
    for line in [*overview.problems, *filter(None, [overview.next_start])]:
        print(printable(line))
