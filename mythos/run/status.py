"""The state of a run, read from its directory. Needs no running process, no Slurm and no torch."""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from mythos.config import yaml_file
from mythos.errors import DONE, PREEMPTED, UserError
from mythos.run.directory import CONFIG_FILE, RunDirectory, newest_checkpoint
from mythos.run.find import is_run
from mythos.run.journal import FAILED, STARTED, read_attempts, read_events
from mythos.run.lock import is_held
from mythos.run.metrics import read_metrics

TAIL_BYTES = 1 << 18
"""metrics.jsonl may be long: only its end is read."""
RECENT_STEPS = 20


@dataclass(frozen=True)
class Status:
    """What is known from the run directory; None for what is not."""

    directory: str
    state: str
    """not started, running, preempted, finished, failed or killed; in a table also unreadable."""
    cause: str | None = None
    host: str | None = None
    seconds_since_last_write: float | None = None
    step: int = 0
    steps: int | None = None
    """None if no start has succeeded yet, or if the configuration cannot be read, see ``problem``."""
    tokens: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
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
    """Why the configuration, or anything, cannot be read."""

    def to_json(self) -> str:
        """One JSON object, for scripts."""
        return json.dumps(asdict(self), indent=2)


def read_status(directory: Path) -> Status:
    """Read the status of the run in ``directory``.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    return _read(directory, _steps(directory))


def read_status_of_any(directory: Path) -> Status:
    """Like ``read_status`` for a run that may be damaged: what cannot be read is None, and ``problem`` says why."""
    problem = None
    try:
        try:
            steps = _steps(directory)
        except UserError as error:
            steps, problem = None, str(error)
        return replace(_read(directory, steps), problem=problem)
    except Exception as error:  # whatever is wrong with one run, a table shows the others
        reason = f"{directory}: cannot be read ({type(error).__name__}: {error})"
        return Status(str(directory), "unreadable", problem=problem or reason)


def _read(directory: Path, steps: int | None) -> Status:
    metrics = read_metrics(directory, TAIL_BYTES)
    training = [line for line in metrics if "train/loss" in line]
    last = training[-1] if training else {}
    rates = [line["perf/tokens_per_second"] for line in training[-RECENT_STEPS:] if line.get("perf/tokens_per_second")]
    rate = statistics.median(rates) if rates else None
    checkpoint, saved_step = newest_checkpoint(directory)
    step = max(last.get("step", 0), saved_step or 0)
    tokens = last.get("train/tokens")
    state, cause, host = _state(directory)
    attempts = read_attempts(directory)
    slurm = [_slurm_variables(attempt) for attempt in attempts]
    last_attempt = attempts[-1] if attempts else {}
    jobs = [variables for variables in slurm if variables]
    left = None
    if rate and tokens and steps is not None and state != "finished":
        left = (steps - step) * tokens / last["step"] / rate
    return Status(
        directory=str(directory),
        state=state,
        cause=cause,
        host=host,
        seconds_since_last_write=_age_s(directory),
        step=step,
        steps=steps,
        tokens=None if tokens is None else int(tokens),
        loss=last.get("train/loss"),
        validation=_last_validation(metrics),
        tokens_per_second=rate,
        seconds_left=left,
        checkpoint=checkpoint,
        checkpoint_step=saved_step,
        attempts=len(slurm),
        ranks=last_attempt.get("ranks"),
        expert_parallel_size=last_attempt.get("expert_parallel_size"),
        slurm_jobs=list(dict.fromkeys(name for name in map(_job_name, jobs) if name)),
        slurm_restarts=_restarts(jobs),
        slurm_job=_job_name(slurm[-1]) if slurm else None,
    )


def describe(status: Status) -> dict[str, str]:
    """The status for a person: the name and the text of each fact that is known."""
    lines = {
        "run": status.directory,
        "state": _describe_state(status),
        "step": f"{describe_step(status)} ({status.step / status.steps:.1%})" if status.steps else None,
        "tokens": None if status.tokens is None else f"{status.tokens:,}",
        "loss": None if status.loss is None else f"{status.loss:.4f}",
        "validation": ", ".join(f"{name} {loss:.4f}" for name, loss in status.validation.items()) or None,
        "speed": None if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s",
        "left": None if status.seconds_left is None else _left(status),
        "checkpoint": status.checkpoint or "none yet",
        "attempts": str(status.attempts),
        "ranks": None if status.ranks is None else f"{status.ranks}{_experts(status)}",
        "slurm jobs": f"{', '.join(status.slurm_jobs)} ({status.slurm_restarts} restarts)"
        if status.slurm_jobs
        else None,
    }
    return {name: text for name, text in lines.items() if text is not None}


def describe_step(status: Status) -> str:
    """The step, and of how many."""
    return f"{status.step:,}" if status.steps is None else f"{status.step:,} of {status.steps:,}"


def _describe_state(status: Status) -> str:
    where = f" on {status.host}" if status.host else ""
    written = describe_last_write(status)
    match status.state:
        case "running":
            return f"running{where}, last write {written}"
        case "preempted":
            return f"preempted, {advice(status)}"
        case "failed":
            return f"failed: {advice(status)}"
        case "killed":
            return f"killed{where} before it could record a cause, last write {written}: {advice(status)}"
        case state:
            return state


def describe_last_write(status: Status) -> str:
    """How long ago the run wrote anything."""
    age_s = status.seconds_since_last_write
    return "never" if age_s is None else f"{_duration(age_s)} ago"


def advice(status: Status) -> str | None:
    """Why the run is not running, and how to continue it; None for a run that needs nothing."""
    remedy, slurm = "start it again to resume", None
    if status.slurm_job:  # may have requeued itself; a second job would be refused while the first one trains
        slurm = f"`squeue --job={status.slurm_job}` shows whether Slurm will restart it"
        remedy = f"{slurm}; if not, start it again to resume"
    match status.state:
        case "preempted":
            return f"{status.cause or 'saved'}: {remedy}"
        case "failed":
            return "; ".join(filter(None, (status.cause or "no cause was recorded", slurm)))
        case "killed":
            return remedy
        case _:
            return None


def _experts(status: Status) -> str:
    return f", expert-parallel size {status.expert_parallel_size}" if status.expert_parallel_size else ""


def _left(status: Status) -> str:
    assert status.seconds_left is not None
    text = _duration(status.seconds_left)
    if status.state != "running":
        return f"{text} of training"
    done = datetime.now() + timedelta(seconds=status.seconds_left)
    return f"{text}, finished at about {done:%Y-%m-%d %H:%M}"


def _steps(directory: Path) -> int | None:
    path = RunDirectory(directory).config
    events = [event["event"] for event in read_events(directory)]
    if not path.exists() and FAILED in events and STARTED not in events:
        return None
    try:
        return int(yaml_file.parse(path.read_text(encoding="utf-8"))["train"]["steps"])
    except (FileNotFoundError, NotADirectoryError):
        if is_run(directory):
            raise UserError(f"{path}: missing: restore it") from None
        raise UserError(
            f"{directory}: not a run directory ({CONFIG_FILE} is missing): give the directory of a run, or one "
            "that contains runs"
        ) from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}): restore it") from None


def _state(directory: Path) -> tuple[str, str | None, str | None]:
    """State, cause of a failure, and the host of rank 0 in the last attempt."""
    events = read_events(directory)
    started = [event for event in events if event["event"] == STARTED]
    host = started[-1].get("host") if started else None
    if is_held(directory):
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


def _slurm_variables(attempt: dict[str, Any]) -> dict[str, str]:
    variables = attempt.get("slurm")
    return variables if isinstance(variables, dict) else {}


def _job_name(variables: dict[str, str]) -> str | None:
    """The job as Slurm's commands name it: SLURM_JOB_ID of the last task of an array names the whole array."""
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables.get('SLURM_ARRAY_TASK_ID')}"
    return variables.get("SLURM_JOB_ID")


def _restarts(jobs: list[dict[str, str]]) -> int:
    """Slurm's count of each job's restarts, summed over the jobs."""
    restarts: dict[str | None, int] = {}
    for job in jobs:
        restarts[_job_name(job)] = int(job.get("SLURM_RESTART_COUNT", "0"))
    return sum(restarts.values())


def _age_s(directory: Path) -> float | None:
    """Seconds since the run last wrote anything."""
    run = RunDirectory(directory)
    paths = (run.events, run.metrics, run.checkpoints, run.latest, run.log(0))
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return max(0.0, time.time() - max(times)) if times else None


def _duration(seconds: float) -> str:
    total_s = round(seconds)
    days, hours, minutes = total_s // 86400, total_s // 3600 % 24, total_s // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total_s % 60} s" if minutes else f"{total_s} s"
