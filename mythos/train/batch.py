"""What a rank works on at a step: its rows of the data and its part of the depth plan."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from mythos.config.derive import global_batch_sequences
from mythos.config.schema import Config
from mythos.data.format import TOKENIZER_FILE, fingerprint, read_data_file
from mythos.data.stream import OrderedStream, TokenDataset
from mythos.errors import UserError
from mythos.model import depth


def draw_depths(config: Config, step: int) -> np.ndarray:
    """Loop steps of each sequence of the global batch at this step; 1 each for a dense model."""
    sequences = global_batch_sequences(config)
    if config.loop is None:
        return np.ones(sequences, dtype=np.int64)
    return depth.draw_depths(config.loop, config.seed, step, sequences)


def own_sequences(config: Config, micro_step: int) -> tuple[slice, slice]:
    """Where a micro-step lies in the global batch, and where this rank's micro batch lies in the micro-step."""
    own, ranks = config.train.micro_batch_sequences, dist.get_world_size()
    start = micro_step * own * ranks
    return slice(start, start + own * ranks), slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)


def own_samples(config: Config, step: int, micro_step: int) -> range:
    """Numbers, counted over the whole run, of the samples in this rank's micro batch."""
    everyone, own = own_sequences(config, micro_step)
    first = (step - 1) * global_batch_sequences(config) + everyone.start + own.start
    return range(first, first + config.train.micro_batch_sequences)


def micro_batch_plan(config: Config, depths: np.ndarray, step: int, micro_step: int) -> depth.DepthPlan | None:
    """This rank's part of the depth plan."""
    if config.loop is None:
        return None
    everyone, own = own_sequences(config, micro_step)
    samples = own_samples(config, step, micro_step)
    seeds = [depth.state_seed(config.seed, sample) for sample in samples]
    return depth.plan(depths[everyone], config.loop.backprop_depth, own, seeds)


def micro_batch(
    config: Config, stream: OrderedStream, step: int, micro_step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's tokens and targets, (B, S) each."""
    samples = own_samples(config, step, micro_step)
    rows = torch.from_numpy(stream.rows(samples.start, len(samples)))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def open_data(config: Config) -> tuple[TokenDataset, TokenDataset]:
    """The training and the validation set.

    Raises:
        UserError: they are missing or damaged, or were prepared for another sequence length or vocabulary.
    """
    directory = Path(config.data.directory)
    training_set, validation_set = TokenDataset(directory, "train"), TokenDataset(directory, "validation")
    manifest = training_set.manifest
    if manifest.sequence_length != config.data.sequence_length:
        raise UserError(
            f"data.sequence_length = {config.data.sequence_length}: {directory} was prepared with "
            f"{manifest.sequence_length}: set that, or prepare the data again"
        )
    if manifest.vocabulary_size > config.model.vocabulary_size:
        raise UserError(
            f"model.vocabulary_size = {config.model.vocabulary_size}: the tokenizer of {directory} has "
            f"{manifest.vocabulary_size} tokens: set at least that"
        )
    if config.sample.tokens:
        read_tokenizer(config)
    return training_set, validation_set


def read_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that made the data's token ids.

    Raises:
        UserError: it is missing or damaged.
    """
    path = Path(config.data.directory) / TOKENIZER_FILE
    text = read_data_file(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: damaged ({error}); run `mythos data prepare` again") from error


def data_identity(config: Config) -> dict[str, Any]:
    """What the order of the samples depends on."""
    return {"fingerprint": fingerprint(Path(config.data.directory)), "seed": config.seed}


def check_data_unchanged(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError when a run is resumed on other data."""
    if before != now:
        changes = ", ".join(
            f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]
        )
        raise UserError(f"the run was started on other data ({changes}): give its data.directory and seed")
