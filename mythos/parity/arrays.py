"""What is missing of an experiment, as job arrays of Slurm.

Each arm has one for its training and one for its evaluation. The number of a task is the seed of its run.
"""

from collections.abc import Iterator, Sequence

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from mythos.parity.experiment import (
    Experiment,
    PlannedRun,
    configuration,
    design_hash,
    own_options,
    run_directory,
)
from mythos.parity.runs import Progress, evaluation_arguments, progress, report_directory
from mythos.readers import read_json

TASK = "${oc.env:SLURM_ARRAY_TASK_ID}"
TASK_IN_PATH = "%a"
"""The number of the task as slurm/eval.sh reads it, and as Slurm itself does in the names of output files."""


class _Run(TypedDict):
    seed: int


class _Arm(TypedDict):
    runs: list[_Run]


class _Report(TypedDict):
    """What is read of report.json."""

    design: str
    arms: dict[str, _Arm]


_REPORT = TypeAdapter(_Report)


def job_arrays(experiment: Experiment, planned: Sequence[PlannedRun]) -> Iterator[list[str]]:
    """The fields of each line of `mythos parity jobs`. Raises UserError if a run or the report is damaged."""
    missing = [found for run in planned if (found := progress(experiment, run)).need != "nothing"]
    for arm in experiment.arms:
        own = [each for each in missing if each.run.arm == arm]
        training = [each for each in own if each.need == "training"]
        if training:
            arguments = _arguments(experiment, training[0].run)
            yield ["training", f"{experiment.name}/{arm}/train", _seeds(training), *arguments]
        if own:
            directory = str(run_directory(experiment, arm, TASK_IN_PATH))
            arguments = [directory, *evaluation_arguments(experiment, own[0].run)]
            yield ["evaluation", f"{experiment.name}/{arm}/eval", _seeds(own), *arguments]
    if missing or not _is_reported(experiment, planned):
        yield ["report", f"{experiment.name}/report"]


def _arguments(experiment: Experiment, run: PlannedRun) -> list[str]:
    """Of `mythos train`, for every seed of the run's arm."""
    directory = run_directory(experiment, run.arm, TASK)
    return [*configuration(experiment, run.arm), *own_options(run.config.train.steps, TASK, directory)]


def _seeds(missing: Sequence[Progress]) -> str:
    return ",".join(str(each.run.seed) for each in missing)


def _is_reported(experiment: Experiment, planned: Sequence[PlannedRun]) -> bool:
    """Whether the report is of this design and of all runs."""
    path = report_directory(experiment) / "report.json"
    if not path.exists():
        return False
    report = read_json(path, _REPORT, "remove it, and write the report again")
    reported = {(name, run["seed"]) for name, arm in report["arms"].items() for run in arm["runs"]}
    return report["design"] == design_hash(experiment) and reported == {(run.arm, run.seed) for run in planned}
