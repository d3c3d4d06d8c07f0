"""The state of a run, read from its directory. Needs no running process, no Slurm and no torch."""

import json
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.config import yaml_file
from mythos.config.values import typed
from mythos.errors import DONE, PREEMPTED, UserError
from mythos.plan.budgets import Position
from mythos.readers import read_yaml
from mythos.run.directory import CONFIG_FILE, RunDirectory, newest_checkpoint, saved_course
from mythos.run.find import is_run
from mythos.run.journal import FAILED, STARTED, attempts_in, attempts_of_version_0_1, read_events
from mythos.run.lock import is_held
from mythos.run.metrics import read_metrics
from mythos.run.planned import RECENT_STEPS, TAIL_BYTES, StepFigures, measured_figures, read_planned

LONGEST_S = 1e10
"""Three centuries: a longer time left is a mistake in the metrics."""


class _Train(TypedDict):
    """What is read of the section `train`."""

    steps: Annotated[int, Field(ge=0, le=2**62)]
    budgets: NotRequired[Any]


class _Config(TypedDict):
    """What is read of the configuration."""

    train: _Train
    optim: NotRequired[Any]


_CONFIG = TypeAdapter(_Config)


@dataclass(frozen=True)
class Status:
    """What is known from the run directory; None for what is not."""

    directory: str
    state: str
    """not started, running, preempted, paused, finished, failed or killed."""
    cause: str | None = None
    host: str | None = None
    seconds_since_last_write: float | None = None
    step: int = 0
    steps: int | None = None
    """None if no start has succeeded yet, or if the configuration cannot be read."""
    tokens: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    """Median of the last steps."""
    peak_memory_gib: float | None = None
    """Largest of a rank."""
    planned_step_seconds: float | None = None
    """Of plan.json; None without one."""
    planned_memory_gib: float | None = None
    seconds_left: float | None = None
    """At the speed of the last steps, whether or not the run is running now."""
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    attempts: int = 0
    ranks: int | None = None
    expert_parallel_size: int | None = None
    slurm_jobs: list[str] = field(default_factory=list)
    slurm_restarts: int = 0
    slurm_job: str | None = None
    """The job of the last attempt; None if that was started outside Slurm."""
    problem: str | None = None
    """The files that cannot be read, and why."""

    def to_json(self) -> str:
        """One JSON object, for scripts."""
        return json.dumps(asdict(self), indent=2)


def read_status(directory: Path) -> Status:
    """Read the status of the run in ``directory``. What cannot be read is None, and ``problem`` says why.

    Raises:
        UserError: there is no run.
    """
    if not is_run(directory) and not RunDirectory(directory).config.exists():
        raise UserError(
            f"{directory}: not a run directory ({CONFIG_FILE} is missing): give the directory of a run, or one "
            "that contains runs"
        )
    problems: list[str] = []

    def known(read: Callable[[Path], Any], otherwise: Any) -> Any:
        try:
            return read(directory)
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or directory}: {error.strerror or error}: repair it")
        return otherwise

    events = known(read_events, [])
    newest: tuple[str | None, Position | None] = known(newest_checkpoint, (None, None))
    steps = known(lambda run: _steps(run, events, newest[1]), None)
    metrics = known(lambda run: read_metrics(run, TAIL_BYTES), [])
    attempts = known(attempts_of_version_0_1, []) + attempts_in(events)
    status = _status(directory, steps, metrics, attempts, newest)
    planned, measured = known(read_planned, None) or StepFigures(), measured_figures(metrics)
    state, cause, host = _state(events, known(is_held, False))
    return replace(
        status,
        state=state,
        cause=cause,
        host=host,
        seconds_since_last_write=known(_age_s, None),
        seconds_left=None if state == "finished" else status.seconds_left,
        step_seconds=measured.step_seconds,
        peak_memory_gib=measured.peak_memory_gib,
        planned_step_seconds=planned.step_seconds,
        planned_memory_gib=planned.peak_memory_gib,
        problem="; ".join(problems) or None,
    )


def _status(
    directory: Path,
    steps: int | None,
    metrics: list[dict[str, Any]],
    attempts: list[dict[str, Any]],
    newest: tuple[str | None, Position | None],
) -> Status:
    """What follows from the files' contents, without the state."""
    training = [line for line in metrics if "train/loss" in line]
    last = training[-1] if training else {}
    rates = [line["perf/tokens_per_second"] for line in training[-RECENT_STEPS:] if line.get("perf/tokens_per_second")]
    rate = statistics.median(rates) if rates else None
    checkpoint, saved_step = newest[0], newest[1].step if newest[1] else None
    step = max(last.get("step", 0), saved_step or 0)
    tokens = last.get("train/tokens")
    slurm = [attempt.get("slurm", {}) for attempt in attempts]
    last_attempt = attempts[-1] if attempts else {}
    jobs = [variables for variables in slurm if variables]
    left = None
    if rate and tokens and last["step"] and steps is not None:
        left = (steps - step) * tokens / (last.get("train/updates") or last["step"]) / rate
    return Status(
        directory=str(directory),
        state="",
        step=step,
        steps=steps,
        tokens=None if tokens is None else int(tokens),
        loss=last.get("train/loss"),
        validation=_last_validation(metrics),
        tokens_per_second=rate,
        seconds_left=left if left is not None and abs(left) < LONGEST_S else None,
        checkpoint=checkpoint,
        checkpoint_step=saved_step,
        attempts=len(slurm),
        ranks=last_attempt.get("ranks"),
        expert_parallel_size=last_attempt.get("expert_parallel_size"),
        slurm_jobs=list(dict.fromkeys(name for name in map(_job_name, jobs) if name)),
        slurm_restarts=_restarts(jobs),
        slurm_job=_job_name(slurm[-1]) if slurm else None,
    )


def _steps(directory: Path, events: list[dict[str, Any]], newest: Position | None) -> int | None:
    path = RunDirectory(directory).config
    names = [event["event"] for event in events]
    if not path.exists():
        if FAILED in names and STARTED not in names:
            return None
        raise UserError(f"{path}: missing: restore it")
    config = read_yaml(path, yaml_file.parse, _CONFIG, "restore it")
    course = saved_course(typed({"train": config["train"], "optim": config.get("optim")}))
    return config["train"]["steps"] if course is None else course.last_step(newest or Position())


def _state(events: list[dict[str, Any]], is_held: bool) -> tuple[str, str | None, str | None]:
    """State, cause of a failure, and the host of rank 0 in the last attempt."""
    started = [event for event in events if event["event"] == STARTED]
    host = started[-1].get("host") if started else None
    if is_held:
        return "running", None, host
    if not events:
        return "not started", None, None
    if events[-1]["event"] == FAILED:
        cause = _first_cause(events)
        if cause.get("exit_code") == PREEMPTED:  # a stop was requested, and there was no time to save
            return "preempted", str(cause.get("message")), host
        place = f"{cause.get('host')}, exit code {cause.get('exit_code')}"
        if "rank" in cause:
            place = f"rank {cause['rank']} on {place}"
        return "failed", f"{cause.get('message')} ({place})", host
    if events[-1]["event"] == STARTED:
        return "killed", None, host
    if "paused" in events[-1]:
        return "paused", str(events[-1]["paused"]), host
    state = {DONE: "finished", PREEMPTED: "preempted"}.get(events[-1].get("exit_code", DONE), "failed")
    return state, None, host


def _first_cause(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The first failure of the last attempt: the errors of other ranks only follow from it."""
    cause, ranks = events[-1], set()
    for event in reversed(events):
        if event["event"] != FAILED or event.get("rank") in ranks:  # a second failure of a rank: an earlier attempt
            break
        cause = event
        ranks.add(event.get("rank"))
    return cause


def _last_validation(metrics: list[dict[str, Any]]) -> dict[str, float]:
    for line in reversed(metrics):
        found = {name: value for name, value in line.items() if name.startswith("val/") and value is not None}
        if found:
            return found
    return {}


def _job_name(variables: dict[str, str]) -> str | None:
    """The job as Slurm's commands name it: SLURM_JOB_ID of the last task of an array names the whole array."""
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables.get('SLURM_ARRAY_TASK_ID')}"
    return variables.get("SLURM_JOB_ID")


def _restarts(jobs: list[dict[str, str]]) -> int:
    """Slurm's count of each job's restarts, summed over the jobs."""
    restarts: dict[str | None, int] = {}
    for job in jobs:
        count = job.get("SLURM_RESTART_COUNT", "")
        restarts[_job_name(job)] = int(count) if re.fullmatch(r"[0-9]{1,9}", count) else 0
    return sum(restarts.values())


def _age_s(directory: Path) -> float | None:
    """Seconds since the run last wrote anything."""
    run = RunDirectory(directory)
    times = []
    for path in (run.events, run.metrics, run.checkpoints, run.latest, run.log(0)):
        with suppress(FileNotFoundError, NotADirectoryError):
            times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None
