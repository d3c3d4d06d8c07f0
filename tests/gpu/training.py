"""Training on synthetic rows, in one process, without a run directory: what the checks of training share."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mythos.config.derive import global_batch_sequences
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.plan.schedule import schedule
from mythos.train.batch import StepBatches
from mythos.train.step import StepResult, train_step
from tests.tiny import tiny_config

UNUSED = Path("unused")


def config_for(device: torch.device, model: str, **overrides: Any) -> Config:
    """A tiny configuration; fp32 unless the overrides say otherwise."""
    return tiny_config(model, UNUSED, UNUSED, **({"device": device.type, "precision": "fp32"} | overrides))


@dataclass(frozen=True)
class SameRows:
    """A stream that repeats the rows of one batch, so that a tiny model learns them within some steps."""

    config: Config
    special_ids: None = None
    """Every token counts as text."""
    answers: None = None
    """Every token counts in the loss."""

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        """Token ids, (count, sequence_length + 1)."""
        batch, length = global_batch_sequences(self.config), self.config.data.sequence_length + 1
        rows = np.random.default_rng(0).integers(self.config.model.vocabulary_size, size=(batch, length))
        return rows[np.arange(first_sample, first_sample + count) % batch]

    def epochs(self, sample: int) -> dict[str, float]:
        """There are no sources."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def train(engine: TrainingEngine, config: Config, steps: int, first_step: int = 0) -> list[StepResult]:
    """Train the engine from a step on."""
    results = []
    first_sample = first_step * global_batch_sequences(config)
    with closing(StepBatches(config, SameRows(config), first_step + 1, first_sample)) as batches:  # type: ignore[arg-type]
        for step in range(first_step, first_step + steps):
            results.append(train_step(engine, batches.take(), schedule(config.optim, step, config.train.steps)))
    return results


def losses(device: torch.device, config: Config, steps: int) -> list[float]:
    """The loss of each step of a new model."""
    results = train(TrainingEngine(config, device), config, steps)
    return [float(result.measured["train/loss"].total) / result.measured["train/loss"].weight for result in results]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Relative, over all steps."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact| (Frobenius norms), in fp64; 0 for two tensors of zeros or without elements."""
    difference = (found.double() - exact.double()).norm().item()
    return difference / exact.double().norm().item() if difference else 0.0
