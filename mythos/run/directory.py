"""The directory of a run: the names of its files, and how an attempt creates or checks it and locks it.

config.yaml                  the configuration that the run trains with
tokenizer.json               the data's tokenizer, with which the run can be exported without its data
plan.json                    what the plan of the newest attempt says, and what was measured when it ended
events.jsonl                 the journal: when and where each attempt started, how it ended, and why
metrics.jsonl                losses, speeds and the rest, by step
events.out.tfevents.*, by_tokens/, by_gflop/   what TensorBoard shows, see ``mythos.run.tensorboard``
log/rank_00000.log           one log per rank, and those of Slurm jobs
checkpoints/                 see ``mythos.checkpoint.layout``; ``latest`` names the newest complete one
evaluations/, export/, inspect/   what `mythos eval`, `mythos export` and `mythos inspect` write
.lock, run_id                see ``mythos.run.lock``
environment.json             of version 0.1: the environments that are in events.jsonl now
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from mythos.config import consent
from mythos.config.layers import CHECKPOINT_DIRECTORY, CONFIG_FILE, read_saved
from mythos.config.load import saved_optim, to_dict
from mythos.config.references import NO_REFERENCES, Reference, config_text
from mythos.config.schema import Config
from mythos.config.tree import get
from mythos.data.format import TOKENIZER_FILE
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import read_bytes, write_atomically
from mythos.plan.budgets import Course, Decay, Position, course_of
from mythos.plan.schedule import RateChange, rate_change
from mythos.readers import LARGE_FILE_BYTES, Count, read_json, read_json_lines
from mythos.run.console import log

LOG_DIRECTORY = "log"
LATEST_FILE = "latest"
PARTIAL_SUFFIX = ".partial"
MANIFEST_FILE = "manifest.json"
"""In each checkpoint, as is state.json."""
STATE_FILE = "state.json"
CHECKPOINT_NAME = re.compile(r"step_(\d{8,18})")
NAME_BYTES = 100
"""Of ``latest`` and ``run_id``."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run directory's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's configuration; its presence is what makes a directory a run directory."""
        return self.path / CONFIG_FILE

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run's data."""
        return self.path / TOKENIZER_FILE

    @property
    def plan(self) -> Path:
        """What was planned and measured."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """The journal."""
        return self.path / "events.jsonl"

    @property
    def environment(self) -> Path:
        """The environments of attempts with version 0.1."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """The directory of the ranks' logs. A batch script may write its own log there before the run starts."""
        return self.path / LOG_DIRECTORY

    def log(self, rank: int) -> Path:
        """The log of a rank."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / CHECKPOINT_DIRECTORY

    @property
    def latest(self) -> Path:
        """Holds the name of the newest complete checkpoint."""
        return self.checkpoints / LATEST_FILE

    @property
    def evaluations(self) -> Path:
        """The results of `mythos eval`."""
        return self.path / "evaluations"

    @property
    def inspections(self) -> Path:
        """What `mythos inspect` writes."""
        return self.path / "inspect"

    @property
    def exports(self) -> Path:
        """The default place of exported weights."""
        return self.path / "export"

    @property
    def lock(self) -> Path:
        """Exists while a process is training here."""
        return self.path / ".lock"

    @property
    def run_id(self) -> Path:
        """The run's number, by which its checkpoints recognise it."""
        return self.path / "run_id"


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after this step of the run."""
    return f"step_{step:08d}"


class _State(TypedDict):
    """What is read of a checkpoint's state here."""

    step: Count
    updates: NotRequired[Count]
    decays: NotRequired[list[Decay]]


_STATE = TypeAdapter(_State)
_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def prepare(
    config: Config, accept: Sequence[str], known: Mapping[str, Reference] = NO_REFERENCES
) -> dict[str, tuple[Any, Any]]:
    """Create the run directory, or check that it belongs to this configuration; rank 0 only.

    Args:
        accept: options that may differ from the run's configuration although they are not free to change.
        known: the values that come from the environment.

    Returns:
        The options that changed since the run's last start and may change, with the old and the new value, and the
        learning rate where the run resumes, if that changes.
        ``config.yaml`` still holds the old values: the caller calls ``write_config`` once all other checks passed.

    Raises:
        UserError: the directory cannot be written, or holds a run with another configuration.
    """
    directory = RunDirectory(Path(config.run.directory))
    changed = {}
    place = f"run.directory = {config.run.directory!r}"
    with os_errors_as_user_errors(place, "choose a directory that can be written"):
        if directory.config.exists():
            changed = _check_same_run(directory.config, config, accept)
        elif directory.path.exists() and not is_place_for_run(directory.path):
            raise UserError(f"{place}: not empty and not a run ({CONFIG_FILE} is missing): choose another directory")
        else:
            directory.path.mkdir(parents=True, exist_ok=True)
            write_config(config, known)
        for needed in (directory.checkpoints, directory.logs):
            needed.mkdir(exist_ok=True)
    return changed


def is_place_for_run(directory: Path) -> bool:
    """Whether the directory holds a run, or nothing but what a batch script and starts that failed leave. OSError."""
    run = RunDirectory(directory)
    return run.config.exists() or all(path in (run.logs, run.events) for path in directory.iterdir())


def write_config(config: Config, known: Mapping[str, Reference] = NO_REFERENCES) -> None:
    """Write the configuration that the run continues with; rank 0 only. Raises OSError."""
    write_atomically(RunDirectory(Path(config.run.directory)).config, config_text(config, known))


def keep_tokenizer(directory: Path, tokenizer: Path) -> None:
    """Copy the data's tokenizer into the run directory: the run can then be exported without its data."""
    write_atomically(RunDirectory(directory).tokenizer, read_bytes(tokenizer, LARGE_FILE_BYTES))


def newest_checkpoint(directory: Path) -> tuple[str | None, Position | None]:
    """Name and position of the checkpoint that ``latest`` names; None for a run without one.

    Raises:
        UserError: it cannot be read.
    """
    run = RunDirectory(directory)
    name = latest_name(run.checkpoints)
    if name is None:
        return None, None
    path = run.checkpoints / name / STATE_FILE
    state = read_json(path, _STATE, f"`mythos checkpoint list {directory}` shows which one is valid")
    return name, Position(state["step"], state.get("updates", state["step"]), tuple(state.get("decays", ())))


def latest_name(checkpoints: Path) -> str | None:
    """The name in the file ``latest``; None if it has none of a checkpoint or cannot be read."""
    try:
        name = read_bytes(checkpoints / LATEST_FILE, NAME_BYTES).decode("utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if CHECKPOINT_NAME.fullmatch(name) else None


def _check_same_run(saved: Path, config: Config, accept: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    before = read_saved(saved)
    changed = consent.differences(before, to_dict(config))
    rate = _rate_change(saved.parent, before, config)
    rates = {}
    if rate is not None and not math.isclose(rate.before, rate.after):
        rates = {f"learning rate at step {rate.step}": (float(f"{rate.before:.4g}"), float(f"{rate.after:.4g}"))}
    if refusal := consent.refusal(changed, accept, rates, rate is not None and rate.jumps):
        if _has_trained(saved.parent):
            raise UserError(f"{saved.parent} holds a run with another configuration:\n{refusal}")
        log.info(f"{saved.parent}: no checkpoint and no metrics yet: the run starts with another configuration")
    return {path: values for path, values in changed.items() if not consent.is_new(path, values)} | rates


def _rate_change(directory: Path, before: Mapping[str, Any], config: Config) -> RateChange | None:
    """How the learning rate changes at the newest checkpoint; None without one, or where it is not known."""
    try:
        _, position = newest_checkpoint(directory)
    except UserError:  # the start reports it, and resumes from an older one
        return None
    old, new = saved_course(before), course_of(config)
    if position is None or old is None:
        return None
    undone = new.undone(position)
    if undone and not (RunDirectory(directory).checkpoints / checkpoint_name(undone.before or 0)).is_dir():
        position = position.without_way_back()
    position = new.on_course(position)
    then, now = old.target(position) or old.steps, new.target(position)
    return None if now is None else rate_change(old.optim, then, new.optim, now, position.updates)


def saved_course(tree: Mapping[str, Any]) -> Course | None:
    """The course of a run's own configuration; None where this version does not know it."""
    optim, steps, budgets = saved_optim(tree.get("optim")), get(tree, "train.steps"), get(tree, "train.budgets")
    if optim is None or not isinstance(steps, int):
        return None
    return Course(optim, steps, [budget for budget in budgets or () if isinstance(budget, int)])


def _has_trained(directory: Path) -> bool:
    """Whether the run has a checkpoint or a line of metrics."""
    run = RunDirectory(directory)
    saved = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return next(read_json_lines(run.metrics, _OBJECT), None) is not None or any(
        path.suffix != PARTIAL_SUFFIX for path in saved
    )
