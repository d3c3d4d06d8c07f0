"""What a run directory tells of its run: no running process, no Slurm and no torch needed."""

import json
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from mythos.errors import DONE, PREEMPTED, UserError
from mythos.run.directory import CONFIG_FILE, ENVIRONMENT_FILE, is_locked
from mythos.run.events import EVENTS_FILE, FAILED, STARTED, read_events

TAIL_BYTES = 1 << 18
RECENT_STEPS = 20


@dataclass(frozen=True)
class Status:
    """A run as its directory shows it; None where the directory does not say."""

    directory: str
    state: str
    """running, preempted, finished, failed, killed, or silent (nobody here can know whether it still runs)."""
    cause: str | None
    host: str | None
    seconds_since_sign_of_life: float | None
    step: int
    steps: int
    tokens: int | None
    loss: float | None
    validation: dict[str, float]
    tokens_per_second: float | None
    seconds_left: float | None
    """At the speed of the last steps, whether or not the run is going on."""
    checkpoint: str | None
    checkpoint_step: int | None
    lives: int
    slurm_jobs: list[str]
    slurm_restarts: int
    slurm_job: str | None
    """The job of the last life, if it ran in one."""

    def to_json(self) -> str:
        """One JSON object, for scripts."""
        return json.dumps(asdict(self), indent=2)


def read_status(directory: Path) -> Status:
    """The status of the run in ``directory``.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    steps = _steps(directory)
    metrics = _last_metrics(directory)
    training = [line for line in metrics if "train/loss" in line]
    last = training[-1] if training else {}
    rates = [line["perf/tokens_per_second"] for line in training[-RECENT_STEPS:] if line.get("perf/tokens_per_second")]
    rate = statistics.median(rates) if rates else None
    checkpoint, saved_step = _checkpoint(directory)
    step = max(last.get("step", 0), saved_step or 0)
    tokens = last.get("train/tokens")
    state, cause, host = _state(directory)
    lives = _lives(directory)
    jobs = [life["slurm"] for life in lives if isinstance(life.get("slurm"), dict) and life["slurm"]]
    left = None
    if rate and tokens and state != "finished":
        left = (steps - step) * tokens / last["step"] / rate
    return Status(
        directory=str(directory),
        state=state,
        cause=cause,
        host=host,
        seconds_since_sign_of_life=_age_s(directory),
        step=step,
        steps=steps,
        tokens=None if tokens is None else int(tokens),
        loss=last.get("train/loss"),
        validation=_last_validation(metrics),
        tokens_per_second=rate,
        seconds_left=left,
        checkpoint=checkpoint,
        checkpoint_step=saved_step,
        lives=len(lives),
        slurm_jobs=list(dict.fromkeys(job["SLURM_JOB_ID"] for job in jobs if "SLURM_JOB_ID" in job)),
        slurm_restarts=_restarts(jobs),
        slurm_job=(lives[-1].get("slurm") or {}).get("SLURM_JOB_ID") if lives else None,
    )


def describe(status: Status) -> str:
    """The status for a person, a fact a line."""
    age = None if status.seconds_since_sign_of_life is None else _duration(status.seconds_since_sign_of_life)
    where = f" on {status.host}" if status.host else ""
    go_on, slurm = "start it again to go on", ""
    if status.slurm_job:  # it may have requeued itself; a second job would be refused while the first one trains
        slurm = f"`squeue --job={status.slurm_job}` tells whether Slurm starts it again"
        go_on = f"{slurm}, else start it to go on"
    state = {
        "running": f"running{where}, last sign of life {age} ago",
        "preempted": f"preempted, {status.cause or 'saved'}: {go_on}",
        "finished": "finished",
        "failed": "; ".join(filter(None, (f"failed: {status.cause}", slurm))),
        "killed": f"killed without a word{where}, last sign of life {age} ago: {go_on}",
        "silent": f"no sign of life since {age} (started{where}): running, or killed without a word",
        "not started": "not started yet",
    }[status.state]
    percent = f" ({status.step / status.steps:.1%})"
    lines = {
        "run": status.directory,
        "state": state,
        "step": f"{status.step:,} of {status.steps:,}{percent}",
        "tokens": None if status.tokens is None else f"{status.tokens:,}",
        "loss": None if status.loss is None else f"{status.loss:.4f}",
        "validation": ", ".join(f"{name} {loss:.4f}" for name, loss in status.validation.items()) or None,
        "speed": None if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s",
        "left": None if status.seconds_left is None else _left(status),
        "checkpoint": status.checkpoint or "none yet",
        "starts": str(status.lives),
        "slurm jobs": f"{', '.join(status.slurm_jobs)} ({status.slurm_restarts} restarts)"
        if status.slurm_jobs
        else None,
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items() if text is not None)


def _left(status: Status) -> str:
    assert status.seconds_left is not None
    text = _duration(status.seconds_left)
    if status.state != "running":
        return f"{text} of training"
    done = datetime.now() + timedelta(seconds=status.seconds_left)
    return f"{text}, done about {done:%Y-%m-%d %H:%M}"


def _steps(directory: Path) -> int:
    path = directory / CONFIG_FILE
    try:
        return int(yaml.safe_load(path.read_text())["train"]["steps"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: no run there ({CONFIG_FILE} is missing): give a run directory") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}): restore it") from None


def _state(directory: Path) -> tuple[str, str | None, str | None]:
    """State, cause of a failure, and the host of the last life's first rank."""
    events = read_events(directory)
    started = [event for event in events if event["event"] == STARTED]
    host = started[-1].get("host") if started else None
    if is_locked(directory):
        return "running", None, host
    if not events:
        return "not started", None, None
    if events[-1]["event"] == FAILED:
        cause = _first_cause(events)
        if cause.get("exit_code") == PREEMPTED:  # asked to stop, and no time to save
            return "preempted", str(cause.get("message")), host
        place = f"rank {cause.get('rank')} on {cause.get('host')}, exit code {cause.get('exit_code')}"
        return "failed", f"{cause.get('message')} ({place})", host
    if events[-1]["event"] == STARTED:
        # The lock is free. On another host it may be one that this host cannot see.
        return ("killed" if host == socket.gethostname() else "silent"), None, host
    state = {DONE: "finished", PREEMPTED: "preempted"}.get(events[-1].get("exit_code", DONE), "failed")
    return state, None, host


def _first_cause(events: list[dict[str, Any]]) -> dict[str, Any]:
    """When a rank fails the others follow with errors of their own: the first one is the cause."""
    first = len(events) - 1
    while first > 0 and events[first - 1]["event"] == FAILED:
        first -= 1
    return events[first]


def _last_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines at the end of metrics.jsonl, which may be too long to read whole."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        texts = file.read().decode(errors="replace").splitlines()
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:  # cut by a kill, or by this reader
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _last_validation(metrics: list[dict[str, Any]]) -> dict[str, float]:
    for line in reversed(metrics):
        found = {name: value for name, value in line.items() if name.startswith("val/") and value is not None}
        if found:
            return found
    return {}


def _checkpoint(directory: Path) -> tuple[str | None, int | None]:
    """Name and step of the newest complete checkpoint."""
    try:
        name = (directory / "checkpoints" / "latest").read_text().strip()
        return name, int(json.loads((directory / "checkpoints" / name / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _lives(directory: Path) -> list[dict[str, Any]]:
    try:
        lives = json.loads((directory / ENVIRONMENT_FILE).read_text())
    except (OSError, ValueError):
        return []
    return [life for life in lives if isinstance(life, dict)] if isinstance(lives, list) else []


def _restarts(jobs: list[dict[str, str]]) -> int:
    """Summed over the jobs, as Slurm counts them."""
    restarts: dict[str, int] = {}
    for job in jobs:
        restarts[job.get("SLURM_JOB_ID", "")] = int(job.get("SLURM_RESTART_COUNT", "0"))
    return sum(restarts.values())


def _age_s(directory: Path) -> float | None:
    """Since anything of the run was last written."""
    names = (EVENTS_FILE, "metrics.jsonl", "checkpoints", "checkpoints/latest", "log/rank_00000.log")
    times = [(directory / name).stat().st_mtime for name in names if (directory / name).exists()]
    return max(0.0, time.time() - max(times)) if times else None


def _duration(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
