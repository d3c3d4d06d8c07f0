"""Rules between options, and between options and the number of processes.

Each rule yields findings instead of raising, so that the user sees all of them at once. Whether an option has an effect
is not checked by a rule: the option itself declares what it needs (see ``mythos.config.option.Needs``).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path

from mythos.config.derive import data_sources, global_batch_sequences
from mythos.config.model_schema import VALUE_GATE_CHANNELS, GroupedQuery, Latent, Looped, MixtureOfExperts
from mythos.config.optim_schema import Muon
from mythos.config.option import Needs, is_path, needs_of
from mythos.config.schema import Config
from mythos.config.tree import get, has, options

SOURCE_NAME = r"[A-Za-z0-9_-]+"
"""A source's name is part of metrics' names and of dotted paths."""
LOWEST_TEMPERATURE = 0.001
SHELL_VARIABLE = r"(?:^|/)\$([A-Za-z_][A-Za-z0-9_]*)"


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
        _vocabulary(config),
        _attention(config),
        _experts(config, world_size),
        _loop(config),
        _batch(config, world_size),
        _budgets(config),
        _data(config),
        _sample(config),
        _paths(config),
        _without_effect(config),
    )
    return [finding for rule in rules for finding in rule]


def _vocabulary(config: Config) -> Iterator[Finding]:
    size, rows, path = config.model.tokenizer_size, config.model.vocabulary_size, "model.tokenizer_size"
    if size is not None and size >= rows:
        remedy = f"must be below model.vocabulary_size ({rows}), the rows of the tables, or null"
        yield Finding(path, size, remedy, ("model.vocabulary_size",))


def _attention(config: Config) -> Iterator[Finding]:
    attention, path = config.model.attention, "model.attention"
    if isinstance(attention, Latent) and attention.rotary_head_size % 2:
        yield Finding(f"{path}.rotary_head_size", attention.rotary_head_size, "must be even")
    if not isinstance(attention, GroupedQuery):
        return
    if attention.heads % attention.kv_heads:
        remedy = f"must divide heads ({attention.heads})"
        yield Finding(f"{path}.kv_heads", attention.kv_heads, remedy, (f"{path}.heads",))
    if attention.head_size % 2:
        yield Finding(f"{path}.head_size", attention.head_size, "must be even, for rotary embedding")
    if attention.value_embeddings and config.model.width < VALUE_GATE_CHANNELS:
        remedy = f"needs a model.width of at least {VALUE_GATE_CHANNELS}, the channels that its gate reads"
        yield Finding(f"{path}.value_embeddings", True, remedy, ("model.width",))


def _experts(config: Config, world_size: int) -> Iterator[Finding]:
    size = config.parallel.expert_parallel_size
    experts = config.model.core_experts if isinstance(config.model, Looped) else None
    path = "parallel.expert_parallel_size"
    if experts is None:
        return
    if size is not None and world_size % size:
        yield Finding(path, size, f"must divide the number of processes ({world_size})")
    if size is not None and experts.experts % size:
        yield Finding(
            path, size, f"must divide model.core_experts.experts ({experts.experts})", ("model.core_experts.experts",)
        )
    yield from _routing(experts)


def _routing(experts: MixtureOfExperts) -> Iterator[Finding]:
    path, count, groups, chosen = "model.core_experts", experts.experts, experts.groups, experts.groups_per_token
    choices = count
    if (groups is None) != (chosen is None):
        yield Finding(f"{path}.groups_per_token", chosen, "give it together with groups, or neither")
    elif groups is not None and chosen is not None:
        if count % groups or count // groups < 2:
            remedy = f"must split experts ({count}) into equal groups of at least 2"
            yield Finding(f"{path}.groups", groups, remedy, (f"{path}.experts",))
        elif chosen > groups:
            yield Finding(f"{path}.groups_per_token", chosen, f"must be at most groups ({groups})", (f"{path}.groups",))
        else:
            choices = chosen * count // groups
    if experts.experts_per_token > choices:
        remedy = f"must be at most the experts a token may choose from ({choices})"
        reads = (f"{path}.experts", f"{path}.groups", f"{path}.groups_per_token")
        yield Finding(f"{path}.experts_per_token", experts.experts_per_token, remedy, reads)


def _loop(config: Config) -> Iterator[Finding]:
    if not isinstance(config.model, Looped):
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
    if config.loop is not None and config.loop.mean_depth == 1 and config.model.residual_scaling != "none":
        remedy = "has no effect with loop.mean_depth = 1: leave it at 'none', or give a larger mean depth"
        yield Finding("model.residual_scaling", config.model.residual_scaling, remedy, ("loop.mean_depth",))


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


def _budgets(config: Config) -> Iterator[Finding]:
    train, optim, path = config.train, config.optim, "train.budgets"
    if train.stop_at is not None and train.stop_at >= train.steps:
        yield Finding(
            "train.stop_at", train.stop_at, f"must be below train.steps ({train.steps}), or null", ("train.steps",)
        )
    if not train.budgets:
        return
    reads = ("train.steps", "optim.cooldown", "optim.cooldown_fraction", "optim.kind")
    if max(train.budgets) >= train.steps or len(set(train.budgets)) < len(train.budgets):
        remedy = f"must be different numbers below train.steps ({train.steps}), which is the last budget"
        yield Finding(path, list(train.budgets), remedy, reads)
    for budget in train.budgets:
        if not 0 < round(budget * optim.cooldown_fraction) < budget:
            remedy = f"{budget} x optim.cooldown_fraction ({optim.cooldown_fraction}) must leave steps before the decay"
            yield Finding(path, list(train.budgets), f"{remedy}, and one in it", reads)
    if isinstance(optim, Muon) and optim.muon_weight_decay and optim.muon_weight_decay_schedule == "linear":
        remedy = "needs optim.muon_weight_decay_schedule=cooldown: before a decay, nothing may depend on its budget"
        yield Finding(path, list(train.budgets), remedy, reads)


def _data(config: Config) -> Iterator[Finding]:
    data = config.data
    if (data.directory is None) == (not data.sources):
        given = "none given" if data.directory is None else "both given"
        yield Finding("data.directory", given, "give it or data.sources, one of the two", ("data.sources",))
        return
    for name in data.sources:
        if not re.fullmatch(SOURCE_NAME, name):
            yield Finding(f"data.sources.{name}", name, "a name may only contain letters, digits, - and _")
    if data.cache_directory is not None and _is_inside(data.cache_directory, config.run.directory):
        remedy = "is inside run.directory: give a directory elsewhere, on each node's own disk"
        yield Finding("data.cache_directory", data.cache_directory, remedy, ("run.directory",))
    for directory, _ in data_sources(config.data).values():
        if "://" in directory and data.cache_directory is None:
            remedy = f"{directory} needs one: give a directory on each node's own disk"
            yield Finding("data.cache_directory", None, remedy, ("data.directory", "data.sources"))


def _is_inside(path: str, directory: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def _sample(config: Config) -> Iterator[Finding]:
    tokens, temperature, longest = config.sample.tokens, config.sample.temperature, config.data.sequence_length
    if tokens > longest:
        yield Finding("sample.tokens", tokens, f"at most data.sequence_length ({longest}), as in training")
    if 0 < temperature < LOWEST_TEMPERATURE:
        remedy = f"must be 0, or at least {LOWEST_TEMPERATURE}: the logits divided by it would overflow"
        yield Finding("sample.temperature", temperature, remedy)


def _paths(config: Config) -> Iterator[Finding]:
    named = {f"data.sources.{name}.directory": source.directory for name, source in config.data.sources.items()}
    plain = {path: get(config, path) for path, field in options().items() if is_path(field) and has(config, path)}
    for path, value in (plain | named).items():
        if isinstance(value, str) and value.startswith("~"):
            yield Finding(path, value, "there is no such home directory: give the whole path, or ./~ for this name")
        elif isinstance(value, str) and (variable := re.search(SHELL_VARIABLE, value)):
            remedy = f"shell variables are not replaced here: write ${{oc.env:{variable[1]}}}"
            yield Finding(path, value, remedy)


def _without_effect(config: Config) -> Iterator[Finding]:
    for path, field in options().items():
        if not has(config, path):
            continue
        value, needs = get(config, path), _unmet(config, path)
        if needs is None or value == field.default:
            continue
        if needs.values:
            why = f"has no effect with {needs.path} = {get(config, needs.path)!r}"
            remedy = f"set {needs.path}={' or '.join(map(str, needs.values))}"
        else:
            why, remedy = f"has no effect without {needs.path}", f"give {needs.path}"
        shown = "given" if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        default = "null" if field.default is None else repr(field.default)
        yield Finding(path, shown, f"{why}: leave it at {default}, or {remedy}", (needs.path,))


def _unmet(config: Config, path: str) -> Needs | None:
    """What the option needs and does not have, itself or through an option at its default, which gives no finding."""
    needs = needs_of(options()[path])
    if needs is None:
        return None
    found = get(config, needs.path)
    if not needs.met(found):
        return needs
    return _unmet(config, needs.path) if found == options()[needs.path].default else None
