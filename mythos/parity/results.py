"""The results of runs: what they are, what they cost, and what `mythos eval` measured of each document."""

import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mythos.config.load import load_run
from mythos.config.schema import Config
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.readers import read_json
from mythos.run.directory import RunDirectory
from mythos.run.metrics import iterate_metrics
from mythos.run.status import read_status

_EVALUATION: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Curve:
    """The validation loss at the mean depth during training, and what the weights had cost by then.

    Of a run with several budgets, the weights' course is that of the last budget: decays from which the run has
    returned are left out, and so is what they cost. ``RunResult.points`` has their validations.
    """

    losses: np.ndarray
    tokens: np.ndarray
    """Positions trained on."""
    flops: np.ndarray
    """Training FLOPs that were executed, by the drawn depths."""
    hours: np.ndarray
    """Of all devices together, in steps: without starts, validations and waiting."""


@dataclass(frozen=True)
class Point:
    """What the weights after a step of a run had cost, and their validation loss at the mean depth."""

    step: int
    updates: int
    """Steps that the weights were trained for: fewer than ``step`` after a return from a decay."""
    tokens: float
    flops: float
    hours: float
    loss: float = np.nan


@dataclass(frozen=True)
class RunResult:
    """One run, with what it has spent at its last step."""

    directory: Path
    config: Config
    step: int
    tokens: float
    text_tokens: float | None
    curve: Curve
    points: tuple[Point, ...]
    """Of every validation in the order of the steps, also in decays from which the run has returned."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Of `mythos eval`: metrics and settings; empty without one."""
    items: dict[str, np.ndarray] = field(default_factory=dict)
    """Of each document or problem, see ``mythos.eval.measure``."""

    @property
    def depth(self) -> int | None:
        """The mean depth of training; None for a dense model."""
        return None if self.config.loop is None else round(self.config.loop.mean_depth)

    def metric(self, name: str, depth: int | None) -> float | None:
        """A metric of the evaluation, such as ``documents_loss``, at a depth; None if it was not measured."""
        found = self.evaluation.get(f"eval/{name}" + ("" if depth is None else f"_depth_{depth}"))
        return None if found is None else float(found)

    def item(self, name: str, depth: int | None) -> np.ndarray | None:
        """Values of each document or problem at a depth."""
        return self.items.get(name + ("" if depth is None else f"_depth_{depth}"))


def read_result(directory: Path, evaluation: Path) -> RunResult:
    """Read a run and one of its evaluations.

    Raises:
        UserError: a file is missing or damaged.
    """
    return with_evaluation(read_run(directory), evaluation)


def read_run(directory: Path) -> RunResult:
    """Read a run without its evaluations. Raises UserError if a file is missing or damaged."""
    config = load_run(RunDirectory(directory).config)
    status = read_status(directory)
    spending = Spending(status.ranks or 1)
    for line in iterate_metrics(directory):
        spending.add(line)
    last = spending.last
    return RunResult(
        directory,
        config,
        status.step,
        last.get("train/tokens", 0.0),
        last.get("train/text_tokens"),
        spending.curve(),
        tuple(spending.points),
    )


def with_evaluation(run: RunResult, path: Path) -> RunResult:
    """The run with one of its evaluations. Raises UserError if that is missing or damaged."""
    return replace(run, evaluation=read_evaluation(path), items=_read_items(path.with_suffix(".npz")))


def read_evaluation(path: Path) -> dict[str, Any]:
    """A result of `mythos eval`. Raises UserError if it cannot be read."""
    return read_json(path, _EVALUATION, "remove it, and evaluate again")


def _read_items(path: Path) -> dict[str, np.ndarray]:
    remedy = "evaluate the run again"
    with os_errors_as_user_errors(path, remedy):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path}: damaged ({error}): {remedy}") from error


class Spending:
    """Sums up what the weights of a run have cost, from the lines of its metrics.

    Args:
        ranks: devices that the run uses.
    """

    def __init__(self, ranks: int) -> None:
        self.last: dict[str, float] = {}
        """Line of training."""
        self.points: list[Point] = []
        self._ranks = ranks
        self._spent = [Point(0, 0, 0.0, 0.0, 0.0)]
        """After each line of training on the course of the present weights."""
        self._course: list[Point] = []
        """Validations on that course."""

    def add(self, line: dict[str, Any]) -> None:
        """Count one line."""
        if line.get("train/tokens") is not None:
            self._train(line)
        if line.get("val/loss") is not None:
            self.points.append(replace(self._spent[-1], step=line["step"], loss=line["val/loss"]))
            self._course.append(self.points[-1])

    def _train(self, line: dict[str, Any]) -> None:
        self.last = line
        updates = int(line.get("train/updates") or line["step"])
        # After the return from a decay, the weights have cost what they had where it began.
        while len(self._spent) > 1 and self._spent[-1].updates >= updates:
            self._spent.pop()
        before = self._spent[-1]
        self._course = [point for point in self._course if point.updates <= before.updates]
        seconds = (line.get("perf/step_seconds") or 0.0) * (updates - before.updates)
        flops = before.flops + seconds * (line.get("perf/model_flops_per_second") or 0.0)
        hours = before.hours + seconds * self._ranks / SECONDS_PER_HOUR
        self._spent.append(Point(line["step"], updates, line["train/tokens"], flops, hours))

    def curve(self) -> Curve:
        """The validations on the course of the present weights."""
        rows = [(each.loss, each.tokens, each.flops, each.hours) for each in self._course]
        return Curve(*np.array(rows, dtype=float).reshape(-1, 4).T)
