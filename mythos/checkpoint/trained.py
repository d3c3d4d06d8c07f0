"""A trained model, wherever its weights are: in a run, in one of its checkpoints, or exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mythos.checkpoint import layout
from mythos.checkpoint.exported import INDEX_FILE, load_exported
from mythos.checkpoint.plain import load_plain_model
from mythos.config.load import load_run
from mythos.config.schema import Config
from mythos.engine.sections import training_dtype
from mythos.errors import UserError
from mythos.model import Model
from mythos.ranks.group import choose_device
from mythos.run.directory import CHECKPOINT_NAME, CONFIG_FILE, MANIFEST_FILE, RunDirectory


@dataclass(frozen=True)
class Trained:
    """A model on the CPU in evaluation mode, its configuration, and the directory that also has its tokenizer."""

    model: Model
    config: Config
    directory: Path


def load_trained(given: Path, step: int | None = None, options: Sequence[str] = ()) -> Trained:
    """Load a model.

    Args:
        given: a run directory, one of its checkpoints, or exported weights.
        step: of a run's checkpoint; None for the newest one.
        options: key=value, which override the saved configuration.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    place = find_trained(given, step, str(given))
    directory = place if (place / INDEX_FILE).exists() else place.parent.parent
    config = load_run(directory / CONFIG_FILE, list(options), 1)
    model = load_exported(place) if directory == place else load_plain_model(config, place)
    return Trained(model, config, directory)


def on_device(model: Model, config: Config) -> torch.device:
    """Move a model to the device of its configuration, with products in the type of training; returns the device.

    Raises:
        UserError: there are too few GPUs.
    """
    device = choose_device(config.device)
    model.to(device).product_type = training_dtype(config, device)
    return device


def find_trained(given: Path, step: int | None, named: str) -> Path:
    """The checkpoint or the exported weights that ``given`` is or has.

    Args:
        named: ``given`` as the user named it.

    Raises:
        UserError: it is or has none.
    """
    is_checkpoint = CHECKPOINT_NAME.fullmatch(given.name) and (given / MANIFEST_FILE).exists()
    if is_checkpoint or (given / INDEX_FILE).exists():
        if step is not None:
            raise UserError(f"--step {step}: {given} is not a run, whose checkpoint could be chosen: leave it out")
        return given
    if RunDirectory(given).checkpoints.is_dir():
        return layout.find(given, step)
    raise UserError(f"{named}: give a run directory, one of its checkpoints, or exported weights")
