"""`mythos status`: the state of a run, read from its directory."""

from typing import Annotated

import typer

from launch.arguments import Run
from launch.table import Column, print_table
from mythos.errors import DONE


def run(
    directory: Run,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for scripts")] = False,
) -> int:
    """Print the state of a run, read from its directory.

    State (running, preempted, finished, failed and why), step, tokens, loss, speed, time left, newest checkpoint, Slurm
    jobs. Needs no running process.
    """
    from mythos.run.status import describe, read_status

    status = read_status(directory)
    if as_json:
        print(status.to_json())
    else:
        print_table((Column(""), Column("")), list(describe(status).items()))
    return DONE
