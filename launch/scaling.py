"""`mythos scaling`: laws of the loss over parameters, tokens and loop steps, fitted to runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.table import Column, print_table
from mythos.errors import DONE

COLUMNS = (Column("quantity"), Column("value", is_number=True), Column("95% interval"))


def run(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run directories, or directories that contain runs")
    ],
    law: Annotated[
        Literal["chinchilla", "parcae", "recurrence"] | None,
        typer.Option(help="the law to fit (default: each that the runs determine)"),
    ] = None,
    parameters: Annotated[
        Literal["total", "active", "matrices"],
        typer.Option(help="what counts: all, those that a token uses, or all but lookup tables and norms"),
    ] = "total",
    flops: Annotated[
        float | None,
        typer.Option(
            metavar="C", min=1.0, max=1e40, help="training FLOPs of the optimum (default: 10 times the largest run's)"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="also write report.md, its pictures and report.json there")
    ] = None,
) -> int:
    """Fit scaling laws to finished runs, and to each budget of a run with several (train.budgets).

    Prints constants with 95% intervals by bootstrap over runs, the error on the largest runs when they are held out,
    and the best of these models, with its loop steps and tokens, for a budget of training FLOPs.
    """
    from mythos.parity.scaling import FORMS
    from mythos.parity.scaling_report import FORMULAS, constants, errors, fit_all, optimum, write_scaling
    from mythos.parity.scaling_runs import read_points

    points = read_points(runs, parameters)
    fits, missing = fit_all(points, FORMS if law is None else (law,))
    budget = flops or 10 * float(points.runs().flops.max())
    for form, found in fits.items():
        print(f"{form}: L = {FORMULAS[form]}")
        rows = [*constants(found), *errors(found), [f"optimum at {budget:.3g} FLOPs", "", ""]]
        print_table(COLUMNS, [*rows, *optimum(points.points, found, budget)])
    for reason in (*missing, *points.left_out):
        print(f"left out: {reason}")
    if output is not None:
        print(write_scaling(points, fits, missing, budget, output))
    return DONE
