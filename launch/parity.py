"""`mythos parity`: an experiment of several arms and seeds, from its file to its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.table import Column, print_table
from mythos.errors import DONE

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
    from mythos.parity.report import write_report
    from mythos.parity.runs import LocalRunner, record_design, report_directory

    design, planned = _planned(experiment)
    record_design(design)
    code = LocalRunner(design, jobs, lambda line: print(line, flush=True)).carry_out(planned)
    if code == DONE:
        print(write_report(design, planned, report_directory(design)))
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
    from mythos.parity.runs import report_directory

    design, planned = _planned(experiment)
    print(write_report(design, planned, output or report_directory(design)))
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


def run_plan(
    experiment: File,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[cluster.NAME=VALUE]...", help="figures of the cluster")
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="file in configs/cluster, a YAML file, or a JSON file of `mythos bench`")
    ] = "h100",
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="nodes of each job")] = 1,
) -> int:
    """Print what the training that is missing would take and cost on a cluster, for each arm and in all.

    A run uses all nodes of its job, or, if its global batch does not divide over them, the largest number over which it
    does; the others stay idle and are in the price. Evaluations are not included.
    `slurm/parity.sh EXPERIMENT.yaml --dry-run` prints it with the jobs.
    """
    from mythos.parity.experiment import load_experiment
    from mythos.parity.price import HOURS_PER_DAY, prices
    from mythos.plan.cluster import load_cluster

    machines = load_cluster(cluster, options or [])
    arms = prices(load_experiment(experiment), machines, nodes)
    rows = []
    for each in arms:
        row = [each.arm, str(each.runs), f"{each.steps:,}", _amount(each.days), _amount(each.gpu_hours)]
        notes = [each.problem] if each.problem else []
        if each.nodes < nodes:
            notes.insert(0, f"uses {each.nodes} of {nodes} nodes: its batch cannot be divided over more")
        rows.append([*row, _amount(each.dollars), "; ".join(notes)])
    numbers = ("runs", "steps", "days a run", "GPU hours", "dollars")
    print_table([Column("arm"), *(Column(name, is_number=True) for name in numbers), Column("")], rows)
    hours, gpus = sum(each.gpu_hours for each in arms), nodes * machines.gpus_per_node
    runs, dollars = sum(each.runs for each in arms), sum(each.dollars for each in arms)
    days = _amount(hours / gpus / HOURS_PER_DAY)
    print(f"{runs} runs: {_amount(hours)} GPU hours, {_amount(dollars)} dollars; one run after the other on {gpus}")
    print(f"GPUs ({nodes} x {machines.name}), {days} days; evaluations are not included")
    return DONE


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def run_jobs(
    experiment: File,
    begin: Annotated[bool, typer.Option("--begin", help="they will be submitted: record the design")] = False,
) -> int:
    """Print what is missing as job arrays whose tasks are seeds, for batch scripts (slurm/parity.sh).

    \b
    Lines of fields that tabs separate, none if everything is finished:
      training    NAME/ARM/train  SEED,...  arguments of `mythos train`, with $SLURM_ARRAY_TASK_ID as the seed
      evaluation  NAME/ARM/eval   SEED,...  a run directory with %a as the seed, and arguments of `mythos eval`
      report      NAME/report
    An evaluation includes the seeds that are to be trained before it.
    """
    from mythos.parity.arrays import job_arrays
    from mythos.parity.runs import record_design

    design, planned = _planned(experiment)
    if begin:
        record_design(design)
    for fields in job_arrays(design, planned):
        print("\t".join(fields))
    return DONE


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
