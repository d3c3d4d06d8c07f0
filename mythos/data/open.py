"""Opening the data of a run: checks against the configuration, and the identity that a resumed run compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mythos.config.consent import arguments, differences, is_accepted
from mythos.config.data_schema import Data
from mythos.config.derive import data_sources
from mythos.data.cache import GIB, Cached, NodeCache
from mythos.data.dataset import KEEP_OPEN, TokenDataset
from mythos.data.format import (
    INDEX_FILE,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    read_data_file,
    tokenizer_problem,
)
from mythos.data.remote import is_object_store
from mythos.data.stream import AHEAD_SHARDS, Source, TokenStream
from mythos.errors import UserError

METADATA = (MANIFEST_FILE, TOKENIZER_FILE, *(f"{split}/{INDEX_FILE}" for split in SPLITS))


@dataclass(frozen=True)
class RunData:
    """Both splits of every source, and the tokenizer that they share.

    ``identity`` determines the samples of the run: the order of the rows and the content of every source.
    """

    training: list[Source]
    validation: list[Source]
    tokenizer: Path
    bos: str
    """The token that begins each document, and so each prompt."""
    identity: dict[str, Any]

    def stream(self) -> TokenStream:
        """The samples to train on."""
        return TokenStream(self.training, self.identity["seed"], self.identity["shuffle_shards"])


def open_data(config: Data, vocabulary_size: int, seed: int, global_batch_sequences: int) -> RunData:
    """Open the data sets that the configuration lists.

    Args:
        vocabulary_size: of the model, without padding.
        seed: of the run.

    Raises:
        UserError: one is missing or damaged, was prepared for another sequence length, vocabulary or tokenizer, or
            the cache cannot hold the shards that are in use.
    """
    cache = None
    if config.cache_directory is not None:
        cache = NodeCache(Path(config.cache_directory), int(config.cache_gib * GIB))
    training: list[Source] = []
    validation: list[Source] = []
    fingerprints = {}
    for name, (place, weight) in data_sources(config).items():
        directory = _metadata(place, cache)
        for split, opened in zip(SPLITS, (training, validation), strict=True):
            storage = None
            if cache is not None:
                remedy = f"copy or prepare {place} again"
                storage = Cached(cache, f"{place.rstrip('/')}/{split}", remedy)
            opened.append(Source(name, weight, TokenDataset(directory, split, storage)))
        _check_fits(config, vocabulary_size, training[-1], place)
        _check_tokenizer(directory, training[0], training[-1])
        fingerprints[name] = validation[-1].dataset.fingerprint
    if cache is not None:
        _check_cache_size(config, training, validation)
    identity = {
        "seed": seed,
        "global_batch_sequences": global_batch_sequences,
        "shuffle_shards": config.shuffle_shards,
        "sources": {
            source.name: {"fingerprint": fingerprints[source.name], "weight": source.weight} for source in training
        },
    }
    first = training[0].dataset
    return RunData(training, validation, first.directory / TOKENIZER_FILE, first.manifest.settings.bos, identity)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that made the token ids of the data, without the truncation and padding that its file may ask for.

    Raises:
        UserError: it is missing or damaged.
    """
    text = read_data_file(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: damaged ({error}); run `mythos data prepare` again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_data_unchanged(before: dict[str, Any], now: dict[str, Any], accept: Sequence[str]) -> list[str]:
    """The changes since the checkpoint was saved, one line each, if ``accept`` names their options.

    The run then resumes at the same sample number, in the order of the new data or seed: which of its rows it has seen
    already is unknown. A new global batch does not change the order.

    Args:
        before: the identity (see ``RunData``) in the checkpoint.
        now: that of the data which the configuration names.

    Raises:
        UserError: the data has changed, and the user has not accepted it.
    """
    changed = differences(before, now)
    refused = [path for path in changed if not any(is_accepted(option, accept) for option in _options_behind(path))]
    if refused:
        lines = ", ".join(f"{path}: {changed[path][0]!r} -> {changed[path][1]!r}" for path in refused)
        remedy = arguments(dict.fromkeys(_options_behind(path)[0] for path in refused))
        raise UserError(
            f"the run was started with other data ({lines}): give the previous data, or accept the change: {remedy}"
        )
    return [f"{path}: {old!r} -> {new!r}" for path, (old, new) in changed.items()]


def _options_behind(path: str) -> tuple[str, ...]:
    """The options that determine a part of the data's identity; accepting one of them is enough."""
    match path.split("."):
        case ["sources", "data", _]:  # the name of a single data set
            return "data.directory", "data.sources.data"
        case ["sources", name, "fingerprint"]:
            return (f"data.sources.{name}.directory",)
        case ["sources", name, "weight"]:
            return (f"data.sources.{name}.weight",)
        case ["global_batch_sequences"]:
            return "train.global_batch_sequences", "train.global_batch_tokens"
        case ["shuffle_shards"]:
            return ("data.shuffle_shards",)
    return (path,)


def _metadata(directory: str, cache: NodeCache | None) -> Path:
    """The local directory of the manifest, the tokenizer and the indexes."""
    if not is_object_store(directory):
        return Path(directory)
    if cache is None:
        raise UserError(
            f"data.cache_directory = None: {directory} needs a cache: choose a directory on each node's own disk"
        )
    return cache.fetch_metadata(directory.rstrip("/"), METADATA)


def _check_fits(config: Data, vocabulary_size: int, source: Source, directory: str) -> None:
    manifest = source.dataset.manifest
    if manifest.sequence_length != config.sequence_length:
        raise UserError(
            f"data.sequence_length = {config.sequence_length}: {directory} was prepared with "
            f"{manifest.sequence_length}: set that, or prepare the data again"
        )
    if manifest.vocabulary_size > vocabulary_size:
        raise UserError(
            f"model.vocabulary_size = {vocabulary_size}: the tokenizer of {directory} has "
            f"{manifest.vocabulary_size} tokens: set at least that, also in model.tokenizer_size if it is given"
        )


def _check_tokenizer(directory: Path, first: Source, source: Source) -> None:
    if problem := tokenizer_problem(directory, source.dataset.manifest):
        raise UserError(f"{problem}; restore that tokenizer, or prepare the data again")
    of_first, of_source = first.dataset.manifest, source.dataset.manifest
    if of_source.answers != of_first.answers:
        raise UserError(
            f"data.sources: of one of {first.name} and {source.name} only the answers count in the loss: train on "
            "synthetic tasks and on text in runs of their own"
        )
    if (of_source.tokenizer_sha256, of_source.settings.bos) != (of_first.tokenizer_sha256, of_first.settings.bos):
        raise UserError(
            f"data.sources: {first.name} and {source.name} were made by different tokenizers, or have another --bos: "
            f"prepare {source.dataset.directory} again with {first.dataset.directory / TOKENIZER_FILE} and --bos "
            f"{of_first.settings.bos!r}"
        )


def _check_cache_size(config: Data, training: Sequence[Source], validation: Sequence[Source]) -> None:
    needed = 0
    for source, in_use in (
        *((source, config.shuffle_shards + AHEAD_SHARDS) for source in training),
        *((source, KEEP_OPEN) for source in validation),
    ):
        shards = source.dataset.shards
        largest = max(shard.raw.bytes + (shard.packed.bytes if shard.packed else 0) for shard in shards)
        needed += largest * min(len(shards), in_use)
    if needed > config.cache_gib * GIB:
        raise UserError(
            f"data.cache_gib = {config.cache_gib}: the shards in use at a time need {needed / GIB:.3g}: "
            "raise it, or lower data.shuffle_shards"
        )
