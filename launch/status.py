"""`mythos status`: the state of runs, read from their directories."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.table import Column, print_table
from mythos.errors import DONE, UserError

if TYPE_CHECKING:
    from mythos.run.status import Status

COLUMNS = (
    Column("run"),
    Column("state"),
    Column("step", is_number=True),
    Column("loss", is_number=True),
    Column("val loss", is_number=True, if_it_fits=2),
    Column("tokens/s", is_number=True, if_it_fits=4),
    Column("last write", is_number=True, if_it_fits=3),
    Column("cause, remedy", if_it_fits=1),
)
UNKNOWN = "-"


def run(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run directories, or directories that contain runs")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON, for scripts: an object, or a list of them for several runs")
    ] = False,
) -> int:
    """Print the state of a run, or a table of several.

    State (running, preempted, paused, finished, failed and why), step, tokens, loss, speed, time left, newest
    checkpoint, Slurm jobs. Reads only the run directories: needs no running process.

    \b
      mythos status runs/demo           one run in detail
      mythos status runs                a row for each run below a directory
    """
    from mythos.run.describe import describe
    from mythos.run.find import find_runs
    from mythos.run.status import read_status

    found = {directory: find_runs(directory) for directory in directories}
    runs = list(dict.fromkeys(run for those in found.values() for run in those))
    if len(directories) == 1 and runs in ([], directories):
        status = read_status(directories[0])
        if as_json:
            print(status.to_json())
        else:
            print_table((Column(""), Column("")), list(describe(status).items()))
        return DONE
    statuses = [read_status(run) for run in runs]
    if as_json:
        print(json.dumps([asdict(status) for status in statuses], indent=2))
    else:
        names = [run.relative_to(directories[0]) if len(directories) == 1 else run for run in runs]
        print_table(COLUMNS, [_row(str(name), status) for name, status in zip(names, statuses, strict=True)])
    if without := [str(directory) for directory, those in found.items() if not those]:
        raise UserError(f"{', '.join(without)}: no run there: give run directories, or directories that contain runs")
    return DONE


def _row(name: str, status: "Status") -> list[str]:
    """The cells of a run; ``UNKNOWN`` for what is not known or not measured."""
    from mythos.run.describe import advice, describe_last_write, describe_step

    loss, rate = status.loss, status.tokens_per_second
    deepest = next(reversed(status.validation.values()), None)
    validation = status.validation.get("val/loss", deepest)
    return [
        name,
        status.state,
        describe_step(status),
        UNKNOWN if loss is None else f"{loss:.4f}",
        UNKNOWN if validation is None else f"{validation:.4f}",
        UNKNOWN if rate is None else f"{rate:,.0f}",
        describe_last_write(status),
        "; ".join(filter(None, (status.problem, advice(status)))) or UNKNOWN,
    ]
