"""Values that follow from the configuration. They are functions, so that they always agree with it."""

import itertools
import math
from collections.abc import Sequence

from mythos.config.data_schema import Data
from mythos.config.model_schema import Dense, Looped
from mythos.config.schema import Config

BF16_BYTES = 2
GATHERED_EXPERTS_BYTES = 16 * 2**30
"""Of routed experts on one rank: a fifth of the memory of a GPU with 80 GB."""


def text_ids(model: Looped | Dense) -> int:
    """The number of token ids that text may have: those of the model without padding."""
    return model.tokenizer_size or model.vocabulary_size


def global_batch_sequences(config: Config) -> int:
    """Sequences in one optimizer step over all ranks, whichever of the two ways it was given."""
    if config.train.global_batch_sequences is not None:
        return config.train.global_batch_sequences
    assert config.train.global_batch_tokens is not None
    return config.train.global_batch_tokens // config.data.sequence_length


def micro_steps(config: Config, world_size: int) -> int:
    """Forward and backward passes of each rank in one optimizer step (gradient accumulation)."""
    return global_batch_sequences(config) // (config.train.micro_batch_sequences * world_size)


def tokens_per_step(config: Config) -> int:
    """Tokens predicted in one optimizer step over all ranks."""
    return global_batch_sequences(config) * config.data.sequence_length


def whole_mean_depth(config: Config) -> int | None:
    """The number of loop steps nearest to the mean depth; None for a dense model."""
    return None if config.loop is None else round(config.loop.mean_depth)


def expert_parallel_size(config: Config, hosts: Sequence[str]) -> int:
    """Number of ranks over which one set of experts is distributed, given the host of each rank; 1 without experts.

    A set belongs to consecutive ranks. Unless the option gives another size, every set stays on one host. Tokens are
    exchanged at every loop step, weights are gathered once, so the size is the smallest for which a rank can hold its
    experts of all core layers: those are what ZeRO-3 gathers at once.
    """
    model = config.model
    experts = model.core_experts if isinstance(model, Looped) else None
    if not isinstance(model, Looped) or experts is None:
        return 1
    if config.parallel.expert_parallel_size is not None:
        return config.parallel.expert_parallel_size
    largest = math.gcd(experts.experts, *(len(list(ranks)) for _, ranks in itertools.groupby(hosts)))
    total_bytes = BF16_BYTES * model.core_layers * experts.experts * 3 * experts.expert_hidden_size * model.width
    sizes = (size for size in range(2, largest) if largest % size == 0)
    return next((size for size in sizes if total_bytes <= size * GATHERED_EXPERTS_BYTES), largest)


def eval_depths(config: Config) -> tuple[int, ...]:
    """Depths at which the validation loss of a looped model is shown; empty for a dense model."""
    depth = whole_mean_depth(config)
    return () if depth is None else config.eval.depths or (depth,)


def data_sources(data: Data) -> dict[str, tuple[str, float]]:
    """Directory and weight of each data set by name, however they were given; a single one is called ``data``."""
    if data.directory is not None:
        return {"data": (data.directory, 1.0)}
    return {name: (source.directory, source.weight) for name, source in sorted(data.sources.items())}
