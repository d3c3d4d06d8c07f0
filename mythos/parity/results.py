"""The results of finished runs: what they are, what they cost, and what `mythos eval` measured of each document."""

import zipfile
from dataclasses import dataclass
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
    """The validation loss at the mean depth during training, and what had been spent by then."""

    losses: np.ndarray
    tokens: np.ndarray
    """Positions trained on."""
    flops: np.ndarray
    """Training FLOPs that were executed, by the drawn depths."""
    hours: np.ndarray
    """Of all devices together, in steps: without starts, validations and waiting."""


@dataclass(frozen=True)
class RunResult:
    """One run, with what it has spent at its last step."""

    directory: Path
    config: Config
    step: int
    tokens: float
    text_tokens: float | None
    curve: Curve
    evaluation: dict[str, Any]
    """Of `mythos eval`: metrics and settings."""
    items: dict[str, np.ndarray]
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
    config = load_run(RunDirectory(directory).config)
    status = read_status(directory)
    points, last = _points(directory, status.ranks or 1)
    return RunResult(
        directory,
        config,
        status.step,
        last.get("train/tokens", 0.0),
        last.get("train/text_tokens"),
        points,
        read_evaluation(evaluation),
        _read_items(evaluation.with_suffix(".npz")),
    )


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


def _points(directory: Path, ranks: int) -> tuple[Curve, dict[str, float]]:
    """The curve, and the last line of training."""
    last: dict[str, float] = {}
    step = tokens = flops = hours = 0.0
    rows = []
    for line in iterate_metrics(directory):
        if "train/tokens" in line:
            last = line
            seconds = (line.get("perf/step_seconds") or 0.0) * (line["step"] - step)
            flops += seconds * (line.get("perf/model_flops_per_second") or 0.0)
            hours += seconds * ranks / SECONDS_PER_HOUR
            step, tokens = line["step"], line["train/tokens"]
        if line.get("val/loss") is not None:
            rows.append((line["val/loss"], tokens, flops, hours))
    columns = np.array(rows, dtype=float).reshape(-1, 4).T
    return Curve(*columns), last
