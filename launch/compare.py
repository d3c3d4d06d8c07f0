"""`mythos compare`: the differences between any runs, grouped by their configuration."""

from pathlib import Path
from typing import Annotated

import typer

from launch.table import Column, print_table
from mythos.errors import DONE

COLUMNS = (
    Column("group"),
    Column("at equal"),
    Column("metric"),
    Column("difference", is_number=True),
    Column("95% interval", is_number=True),
    Column(""),
)


def run(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run directories, or directories that contain runs")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="the group that the others are compared with (default: the first one)"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="validation_loss, bits_per_byte, loss, accuracy, or a metric of `mythos eval` (default: what was "
            "measured)",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="also write report.md, its pictures and report.json there")
    ] = None,
) -> int:
    """Compare runs at equal tokens, equal training FLOPs and equal device time.

    Runs whose configuration differs in the seed alone are one group. Every group is compared with the reference at the
    largest budget that both have reached, with 95% intervals over documents and seeds; one seed is no verdict.
    Unfinished runs count as far as they are; what cannot be read is left out and named.
    """
    from mythos.parity.compare import differences, find_group
    from mythos.parity.compare_report import cells, write_comparison
    from mythos.parity.groups import read_groups

    grouped = read_groups(runs)
    against = find_group(grouped.groups, reference)
    rows = differences(grouped.groups, against, metric)
    for group in grouped.groups:
        seeds = ", ".join(map(str, group.arm.seeds))
        print(f"{group.name}: seed{'s' if len(group.arm.seeds) > 1 else ''} {seeds}")
    for reason in grouped.left_out:
        print(f"left out: {reason}")
    if rows:
        print(f"differences from {against.name}:")
        print_table(COLUMNS, [cells(row) for row in rows])
    else:
        print("there is one group: nothing to compare it with")
    if output is not None:
        print(write_comparison(grouped, rows, output))
    return DONE
