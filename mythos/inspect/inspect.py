"""`mythos inspect`: measures a checkpoint on a fixed sample and writes the report, its pictures and its numbers."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mythos.checkpoint.plain import load_plain_model
from mythos.checkpoint.trained import on_device
from mythos.config.derive import text_ids
from mythos.config.schema import Config
from mythos.data.open import open_data
from mythos.data.stream import Source
from mythos.data.targets import counted_targets
from mythos.drawing import pixels, png
from mythos.errors import os_errors_as_user_errors
from mythos.eval.batches import validation_rows
from mythos.files import write_atomically
from mythos.inspect.observe import Observation, Sample, observe
from mythos.inspect.pictures import pictures
from mythos.inspect.report import report
from mythos.inspect.summary import Gains, costs, figures, gains_by_frequency, gains_by_position
from mythos.run.directory import RunDirectory
from mythos.run.tensorboard import write_inspection

TOKENS_AT_ONCE = 4096
ROWS_COUNTED = 1024
"""Validation rows in which the frequency of tokens is counted."""
REMEDY = "free space, or make the run directory writable"


@dataclass(frozen=True)
class Inspection:
    """What was observed, on which rows of which source."""

    observation: Observation
    gains: tuple[tuple[str, Gains], ...]
    source: str
    rows: int


def inspect(config: Config, checkpoint: Path, rows: int, most: int) -> Path:
    """Inspect a checkpoint of the run, and write RUN/inspect/; returns the path of the report.

    Args:
        rows: validation rows of the first data source: the first ones of the fixed random order of `mythos eval`.
        most: largest number of loop steps.

    Raises:
        UserError: the checkpoint or the data cannot be read, or the report cannot be written.
    """
    model = load_plain_model(config, checkpoint)
    device = on_device(model, config)
    source = open_data(config.data, text_ids(config.model), config.seed, 1).validation[0]
    sample = _sample(source, rows)
    at_once = max(1, TOKENS_AT_ONCE // config.data.sequence_length)
    observation = observe(model, sample, most, at_once, device)
    gains: tuple[tuple[str, Gains], ...] = ()
    if observation.state is not None:
        counts_V = _counts(source, config.model.vocabulary_size)
        by_frequency = gains_by_frequency(observation, sample.targets_RS, counts_V)
        gains = (("frequency", by_frequency), ("position", gains_by_position(observation)))
    found = Inspection(observation, gains, source.name, len(sample.seeds))
    return _write(config, checkpoint, found)


def _sample(source: Source, rows: int) -> Sample:
    """The rows, whose first loop states are those that a validation gives them."""
    numbers = validation_rows(source.dataset, rows)
    tokens = source.dataset.read(numbers)
    targets = counted_targets(tokens, source.dataset.manifest.answers)
    return Sample(tokens[:, :-1].copy(), targets.copy(), tuple(numbers.tolist()))


def _counts(source: Source, vocabulary_size: int) -> np.ndarray:
    """How often each id is a target in validation rows."""
    numbers = validation_rows(source.dataset, ROWS_COUNTED)
    return np.bincount(source.dataset.read(numbers)[:, 1:].ravel(), minlength=vocabulary_size)


def _write(config: Config, checkpoint: Path, found: Inspection) -> Path:
    run = RunDirectory(checkpoint.parent.parent)
    step = int(checkpoint.name.removeprefix("step_"))
    drawn = dict(pictures(found.observation, [each for _, each in found.gains], costs(config)))
    title = f"{run.path.name}, {checkpoint.name}"
    measured = f"{found.rows} validation rows of {found.source}, {time.strftime('%Y-%m-%d')}"
    with os_errors_as_user_errors(run.inspections, REMEDY):
        run.inspections.mkdir(exist_ok=True)
        for old in run.inspections.glob("*.png"):
            old.unlink()
        for name, figure in drawn.items():
            write_atomically(run.inspections / f"{name}.png", png(figure))
        numbers = {"checkpoint": checkpoint.name, "step": step, **figures(found.observation, found.gains, config)}
        write_atomically(run.inspections / "figures.json", json.dumps(numbers, indent=1))
        path = run.inspections / "report.md"
        write_atomically(path, report(title, measured, config, found.observation, list(drawn)))
        write_inspection(run.path, step, {f"inspect/{name}": pixels(each) for name, each in drawn.items()})
    return path
