"""`mythos inspect`: what a trained model does inside, as a page of pictures."""

from typing import Annotated

import typer

from launch.arguments import Run, RunOverrides, Step
from mythos.errors import DONE, UserError

LOOPS_BEYOND = 4


def run(
    directory: Run,
    overrides: RunOverrides = None,
    step: Step = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="validation rows to look at")] = 16,
    most_depth: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="largest number of loop steps (default: 4 times the mean)")
    ] = None,
) -> int:
    """Look into a checkpoint: loss by depth, the loop's state, experts, halting, cost.

    Writes RUN/inspect/report.md with its pictures, and figures.json with their numbers; TensorBoard shows the pictures
    as well. Runs in one process, on a GPU if there is one.

    \b
      mythos inspect runs/demo
      mythos inspect runs/demo --step 100 --rows 64 device=cpu
    """
    from mythos.checkpoint.layout import find
    from mythos.config.arguments import split_arguments
    from mythos.config.load import load_run
    from mythos.inspect.inspect import inspect
    from mythos.run.directory import RunDirectory
    from mythos.run.paths import found_from_here

    names, options = split_arguments(overrides or [])
    if names:
        raise UserError(f"{names[0]}: not of the form key=value; name a checkpoint by its step: --step N")
    config = found_from_here(load_run(RunDirectory(directory).config, options, 1), directory)
    checkpoint = find(directory, step)
    mean = 0 if config.loop is None else round(config.loop.mean_depth)
    if most_depth is not None and config.loop is None:
        raise UserError(f"--most-depth {most_depth}: this model has no loop: leave it out")
    if most_depth is not None and most_depth < mean:
        raise UserError(f"--most-depth {most_depth}: below the mean depth of training: give at least {mean}")
    report = inspect(config, checkpoint, rows, most_depth or LOOPS_BEYOND * mean)
    print(f"{checkpoint.name} of {directory}: {report}")
    return DONE
