"""The samples of a run, numbered from 0: the row and the data set of each.

Sample n belongs to one source (``mixture.py``) and is one of that source's samples, which go through its rows epoch by
epoch (``order.py``). So the position of a run is a single number, and the stream does not depend on ranks: for any
world size, and after any resume, the same sample numbers give the same rows.
"""

import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xxhash

from mythos.data.dataset import TokenDataset
from mythos.data.format import Answers
from mythos.data.mixture import Mixture
from mythos.data.order import Order
from mythos.errors import UserError

AHEAD_SHARDS = 8
"""Number of shards that are opened (fetched, hash checked) before the order needs them."""
THREADS = 8
_OTHER_FILES = 256
"""Number of files that a process may have open in addition to its shards."""


@dataclass(frozen=True)
class Source:
    """A data set with its weight in the mixture."""

    name: str
    weight: float
    dataset: TokenDataset


@dataclass(frozen=True)
class AnswerTargets:
    """Only answers count in the loss."""

    tokens: Answers
    in_a_row: float
    """Mean number of targets that count in a row of the sources' training splits, by their weights."""


class TokenStream:
    """An endless sequence of samples from one or several sources.

    Args:
        sources: their sequence does not matter, but their names do: each name gives another order of the rows.
        seed: of the whole run.
        shuffle_shards: number of shards of each source whose rows are mixed at a time.

    Raises:
        UserError: this process may not have that many files open.
    """

    def __init__(self, sources: Sequence[Source], seed: int, shuffle_shards: int) -> None:
        self.sources = sorted(sources, key=lambda source: source.name)
        self.special_ids = self.sources[0].dataset.manifest.special_ids
        """Of the tokenizer that all sources share; None if an earlier version prepared the data."""
        self.answers = _answers(self.sources)
        """What counts in the loss; None: every target."""
        self.mixture = Mixture([source.weight for source in self.sources])
        self._orders = [
            Order(
                [shard.rows for shard in source.dataset.shards],
                seed,
                shuffle_shards,
                series=xxhash.xxh64(source.name.encode()).intdigest(),
            )
            for source in self.sources
        ]
        self._prepared: list[tuple[int, int] | None] = [None] * len(self.sources)
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="shards")
        _allow_open_files(sum(order.in_use + AHEAD_SHARDS for order in self._orders))

    def samples(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For each of these samples, the number of its source and its row there; int64 of shape (count,) each."""
        located = [self.mixture.locate(sample) for sample in range(first_sample, first_sample + count)]
        numbers = np.array([number for number, _ in located], dtype=np.int64)
        rows = np.empty(count, dtype=np.int64)
        for number, order in enumerate(self._orders):
            own = numbers == number
            if own.any():  # the samples of a source are consecutive within it
                rows[own] = order.indices(located[int(own.argmax())][1], int(own.sum()))
        return numbers, rows

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        """The token ids of these samples, int64 of shape (count, sequence_length + 1). Not thread safe.

        Raises:
            UserError: a shard is missing or damaged, or cannot be fetched.
        """
        self._prepare(first_sample)
        numbers, rows = self.samples(first_sample, count)
        tokens = np.empty((count, self.sources[0].dataset.sequence_length + 1), dtype=np.int64)
        for number, source in enumerate(self.sources):
            own = numbers == number
            if own.all():
                return source.dataset.read(rows)
            if own.any():
                tokens[own] = source.dataset.read(rows[own])
        return tokens

    def epochs(self, samples: int) -> dict[str, float]:
        """The number of epochs of each source after this many samples."""
        counts = self.mixture.counts(samples)
        return {
            source.name: count / order.rows
            for source, order, count in zip(self.sources, self._orders, counts, strict=True)
        }

    def close(self) -> None:
        """Close all files, without waiting for shards that are being fetched."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for source in self.sources:
            source.dataset.close()

    def _prepare(self, sample: int) -> None:
        """Open the shards that are needed from this sample on, and the following ones, in the background."""
        counts = self.mixture.counts(sample)
        for number, (source, order, count) in enumerate(zip(self.sources, self._orders, counts, strict=True)):
            slot = order.slot_of(count)
            if slot != self._prepared[number]:
                self._prepared[number] = slot
                wanted = islice(order.shards_from(count), order.in_use + AHEAD_SHARDS)
                source.dataset.prepare(wanted, self._executor)


def _answers(sources: Sequence[Source]) -> AnswerTargets | None:
    tokens = sources[0].dataset.manifest.answers
    if tokens is None:
        return None
    weights = sum(source.weight for source in sources)
    in_a_row = 0.0
    for source in sources:
        counts = source.dataset.manifest.splits["train"]
        in_a_row += source.weight / weights * (counts.counted_targets or 0) / counts.sequences
    return AnswerTargets(tokens, in_a_row)


def _allow_open_files(shards: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"data.shuffle_shards: {shards} shards would be open at a time, but this process may open only {hard} "
            "files: lower it, or raise `ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
