"""`mythos parity`: an experiment of several arms and seeds, from its file to its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.table import Column, print_table
from mythos.errors import DONE, UserError

if TYPE_CHECKING:
    from mythos.parity.experiment import Experiment, PlannedRun
    from mythos.parity.runs import Progress

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="such as configs/parity/smoke.yaml")]
COLUMNS = (
    Column("arm"),
    Column("seed", is_number=True),
    Column("state"),
    Column("step", is_number=True),
    Column("of", is_number=True),
    Column("loss", is_number=True),
    Column("val loss", is_number=True),
    Column("time left", is_number=True),
)
UNKNOWN = "-"


def run(
    experiment: File,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, max=1024, help="runs at a time")] = 1,
) -> int:
    """Train and evaluate every arm with every seed on this machine, then write the report.

    What is finished is not done again: after a stop, a failure or a kill, run it again.
    """
    from mythos.parity.experiment import design_hash, load_experiment, planned_runs
    from mythos.parity.report import write_report
    from mythos.parity.runs import LocalRunner, record_design

    design = load_experiment(experiment)
    planned = planned_runs(design)
    record_design(design, design_hash(design))
    code = LocalRunner(design, jobs, lambda line: print(line, flush=True)).carry_out(planned)
    if code == DONE:
        print(write_report(design, planned, Path(design.directory) / "report"))
    return code


def run_report(
    experiment: File,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="where to write it (default: DIRECTORY/report)"),
    ] = None,
) -> int:
    """Write the report of what is finished: verdict, arms, differences, pictures, what is missing."""
    from mythos.parity.report import write_report

    design, planned = _planned(experiment)
    print(write_report(design, planned, output or Path(design.directory) / "report"))
    return DONE


def run_status(experiment: File) -> int:
    """Print a row for each arm and seed: state, step, losses, time left."""
    from mythos.run.describe import duration

    rows = []
    for each in _progress(experiment):
        status, config = each.status, each.run.config
        row = [each.run.arm, str(each.run.seed), each.state, str(status.step if status else 0), str(config.train.steps)]
        if status is None:
            rows.append([*row, UNKNOWN, UNKNOWN, UNKNOWN])
            continue
        left = UNKNOWN if status.seconds_left is None or each.need != "training" else duration(status.seconds_left)
        rows.append([*row, _number(status.loss), _number(status.validation.get("val/loss")), left])
    print_table(COLUMNS, rows)
    return DONE


def run_jobs(experiment: File) -> int:
    """Print what is missing, for batch scripts: a line `NEED ARM SEED DIRECTORY` for each run that is not evaluated."""
    for each in _progress(experiment):
        if each.need != "nothing":
            print(each.need, each.run.arm, each.run.seed, each.run.directory)
    return DONE


def run_arguments(
    experiment: File,
    arm: Annotated[str, typer.Argument(metavar="ARM")],
    seed: Annotated[int, typer.Argument(metavar="SEED")],
    evaluation: Annotated[bool, typer.Option("--evaluation", help="those of `mythos eval`, after the run")] = False,
) -> int:
    """Print the arguments of `mythos train` for a run, one on each line, for batch scripts."""
    from mythos.parity.runs import evaluation_arguments

    design, planned = _planned(experiment)
    for each in planned:
        if (each.arm, each.seed) == (arm, seed):
            print("\n".join(evaluation_arguments(design, each) if evaluation else each.arguments))
            return DONE
    raise UserError(f"{experiment}: has no arm {arm} with seed {seed}: see `mythos parity status {experiment}`")


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _planned(path: Path) -> "tuple[Experiment, list[PlannedRun]]":
    from mythos.parity.experiment import load_experiment, planned_runs

    design = load_experiment(path)
    return design, planned_runs(design)


def _progress(path: Path) -> "list[Progress]":
    from mythos.parity.runs import progress

    design, planned = _planned(path)
    return [progress(design, each) for each in planned]
