"""Rules between options, and between options and the number of processes.

Each rule yields findings instead of raising, so that the user sees all of them at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mythos.config.derive import global_batch_sequences
from mythos.config.schema import Config, Dense, Looped


@dataclass(frozen=True)
class Finding:
    """One thing wrong with the configuration: the option's dotted path, its value and what would be right.

    ``reads`` are the other options that the rule compares it with.
    """

    path: str
    value: object
    remedy: str
    reads: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path} = {self.value!r}: {self.remedy}"


def check(config: Config, world_size: int) -> list[Finding]:
    """All findings for this configuration on ``world_size`` processes."""
    rules = (
        _attention(config),
        _experts(config, world_size),
        _loop(config),
        _batch(config, world_size),
    )
    return [finding for rule in rules for finding in rule]


def _attention(config: Config) -> Iterator[Finding]:
    attention = config.model.attention
    if attention.heads % attention.kv_heads:
        yield Finding(
            "model.attention.kv_heads",
            attention.kv_heads,
            f"must divide heads ({attention.heads})",
            ("model.attention.heads",),
        )
    if attention.head_size % 2:
        yield Finding("model.attention.head_size", attention.head_size, "must be even, for rotary embedding")


def _experts(config: Config, world_size: int) -> Iterator[Finding]:
    size = config.parallel.expert_parallel_size
    experts = config.model.core_experts if isinstance(config.model, Looped) else None
    path = "parallel.expert_parallel_size"
    if world_size % size:
        yield Finding(path, size, f"must divide the number of processes ({world_size})")
    if experts is None:
        if size > 1:
            yield Finding(path, size, "the model has no experts: set it to 1, or give model.core_experts")
        return
    if experts.experts % size:
        yield Finding(
            path, size, f"must divide model.core_experts.experts ({experts.experts})", ("model.core_experts.experts",)
        )
    if experts.experts_per_token > experts.experts:
        yield Finding(
            "model.core_experts.experts_per_token",
            experts.experts_per_token,
            f"must be at most experts ({experts.experts})",
            ("model.core_experts.experts",),
        )


def _loop(config: Config) -> Iterator[Finding]:
    if isinstance(config.model, Dense):
        if config.loop is not None:
            yield Finding("loop", "given", "a dense model has no loop: remove the section, or set model.kind=looped")
        if config.eval.depths is not None:
            yield Finding("eval.depths", list(config.eval.depths), "a dense model has one depth: set it to null")
        return
    if config.loop is None:
        yield Finding("loop", None, "a looped model needs it: give at least loop.mean_depth")
    elif config.loop.depth == "fixed" and config.loop.mean_depth != round(config.loop.mean_depth):
        yield Finding(
            "loop.mean_depth",
            config.loop.mean_depth,
            "must be a whole number when loop.depth is fixed",
            ("loop.depth",),
        )


def _batch(config: Config, world_size: int) -> Iterator[Finding]:
    train, length = config.train, config.data.sequence_length
    if (train.global_batch_sequences is None) == (train.global_batch_tokens is None):
        given = "both given" if train.global_batch_tokens else "none given"
        yield Finding("train.global_batch_sequences", given, "give it or train.global_batch_tokens, one of the two")
        return
    if train.global_batch_tokens is not None and train.global_batch_tokens % length:
        yield Finding(
            "train.global_batch_tokens",
            train.global_batch_tokens,
            f"must be a multiple of data.sequence_length ({length})",
            ("data.sequence_length",),
        )
        return
    path = "train.global_batch_sequences" if train.global_batch_tokens is None else "train.global_batch_tokens"
    sequences, at_once = global_batch_sequences(config), train.micro_batch_sequences * world_size
    if sequences % at_once:
        lower, upper = sequences // at_once * at_once, (sequences // at_once + 1) * at_once
        unit = 1 if train.global_batch_tokens is None else length
        nearest = " or ".join(str(size * unit) for size in (lower, upper) if size)
        yield Finding(
            path,
            getattr(train, path.removeprefix("train.")),
            f"must be a multiple of train.micro_batch_sequences ({train.micro_batch_sequences}) x processes "
            f"({world_size}) = {at_once} sequences: nearest is {nearest}",
            ("train.micro_batch_sequences", "data.sequence_length"),
        )
