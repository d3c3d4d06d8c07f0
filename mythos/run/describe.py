"""The status of a run for a person: the text of each fact, and how to continue."""

from datetime import datetime, timedelta

from mythos.run.status import Status


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
        "step time": _planned(status.step_seconds, status.planned_step_seconds, "s"),
        "memory": _planned(status.peak_memory_gib, status.planned_memory_gib, "GiB"),
        "left": None if status.seconds_left is None else _left(status),
        "checkpoint": status.checkpoint or "none yet",
        "attempts": str(status.attempts),
        "ranks": None if status.ranks is None else f"{status.ranks}{_experts(status)}",
        "problem": status.problem,
        "slurm jobs": f"{', '.join(status.slurm_jobs)} ({status.slurm_restarts} restarts)"
        if status.slurm_jobs
        else None,
    }
    return {name: text for name, text in lines.items() if text is not None}


def _planned(measured: float | None, planned: float | None, unit: str) -> str | None:
    """What was measured and what plan.json says, as far as each is known."""
    if measured is None and planned is None:
        return None
    found = "not measured yet" if measured is None else f"{measured:.3g} {unit}"
    return found if planned is None else f"{found}, planned {planned:.3g} {unit}"


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
        case "paused":
            return f"paused {status.cause}: {advice(status)}"
        case "failed":
            return f"failed: {advice(status)}"
        case "killed":
            return f"killed{where} before it could record a cause, last write {written}: {advice(status)}"
        case state:
            return state


def describe_last_write(status: Status) -> str:
    """How long ago the run wrote anything."""
    age_s = status.seconds_since_last_write
    return "never" if age_s is None else f"{duration(age_s)} ago"


def advice(status: Status) -> str | None:
    """Why the run is not running, and how to continue it; None for a run that needs nothing."""
    remedy, slurm = "start it again to resume", None
    if status.slurm_job:  # may have requeued itself; a second job would be refused while the first one trains
        slurm = f"`squeue --job={status.slurm_job}` shows whether Slurm will restart it"
        remedy = f"{slurm}; if not, start it again to resume"
    match status.state:
        case "preempted":
            return f"{status.cause or 'saved'}: {remedy}"
        case "paused":
            return "raise train.stop_at, or set it to null, to continue"
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
    text = duration(status.seconds_left)
    if status.state != "running":
        return f"{text} of training"
    done = datetime.now() + timedelta(seconds=status.seconds_left)
    return f"{text}, finished at about {done:%Y-%m-%d %H:%M}"


def duration(seconds: float) -> str:
    total_s = round(seconds)
    days, hours, minutes = total_s // 86400, total_s // 3600 % 24, total_s // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total_s % 60} s" if minutes else f"{total_s} s"
