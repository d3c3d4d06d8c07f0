"""Values that follow from the configuration. They are functions, so that they always agree with it."""

import itertools
import math
from collections.abc import Sequence

from mythos.config.model_schema import Dense, GroupedQuery, Looped
from mythos.config.schema import Config, Data


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

    A set belongs to consecutive ranks. Unless the option gives another size, it is the largest one for which every set
    stays on one host.
    """
    experts = config.model.core_experts if isinstance(config.model, Looped) else None
    if experts is None:
        return 1
    if config.parallel.expert_parallel_size is not None:
        return config.parallel.expert_parallel_size
    return math.gcd(experts.experts, *(len(list(ranks)) for _, ranks in itertools.groupby(hosts)))


def eval_depths(config: Config) -> tuple[int, ...]:
    """Depths at which the validation loss of a looped model is shown; empty for a dense model."""
    depth = whole_mean_depth(config)
    return () if depth is None else config.eval.depths or (depth,)


def has_value_embedding(model: Looped | Dense, layer: int, layers: int) -> bool:
    """Whether this layer of the model (a core layer counts once) has a table: every second one, including the last."""
    attention = model.attention
    return isinstance(attention, GroupedQuery) and attention.value_embeddings and (layers - 1 - layer) % 2 == 0


def data_sources(data: Data) -> dict[str, tuple[str, float]]:
    """Directory and weight of each data set by name, however they were given; a single one is called ``data``."""
    if data.directory is not None:
        return {"data": (data.directory, 1.0)}
    return {name: (source.directory, source.weight) for name, source in sorted(data.sources.items())}
