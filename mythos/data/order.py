"""The order in which an epoch reads a data set: a formula instead of a stored permutation of all rows.

With S shards of r_s rows and G = min(shuffle_shards, S), in epoch e:

    sigma_e          a random permutation of the shards
    pi_{e,s}         a random permutation of the rows of shard s
    chunk(s, c)    = pi_{e,s}[ c r_s // G : (c + 1) r_s // G ]                  c = 0 .. G - 1
    slot t         = chunk(sigma_e(t - c mod S), c) for every c, shuffled       t = 0 .. S - 1
    epoch e        = slot 0, slot 1, ..., slot S - 1

Every chunk of every shard is in exactly one slot, so an epoch holds each row once. A slot mixes G shards evenly: two
neighbours come from the same shard with probability 1 / G. From one slot to the next, one shard leaves and one enters,
so a reader needs G shards at a time and knows the following ones long in advance. The rows of a shard are spread over G
slots, that is, over as many samples as G shards have rows. With G = S a slot is a sample of the whole data set with the
same share of every shard.

Memory: the permutations of the shards in use, 8 bytes per row. Any sample is found from its number alone, in
milliseconds. A permutation is the argsort of raw output of Philox, whose key is (seed, epoch) and whose counter holds
the purpose: numpy guarantees the stream of the bit generator for all versions, but not that of ``permutation``.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from mythos.random_streams import Purpose, philox


def random_order(length: int, seed: int, epoch: int, purpose: Purpose, number: int, series: int = 0) -> np.ndarray:
    """A random permutation of range(length), int64, that depends on the arguments alone."""
    return np.argsort(philox(purpose, seed, epoch, number, series).random_raw(length), kind="stable")


class Order:
    """Sample number -> row of the data set, epoch after epoch without a gap.

    Args:
        shard_rows: rows of each shard, in the order of the data set.
        seed: of the whole run.
        shuffle_shards: number of shards whose rows are mixed at a time.
        series: distinguishes orders of the same seed, such as those of several sources.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, shuffle_shards: int, series: int = 0) -> None:
        self._rows = np.asarray(shard_rows, dtype=np.int64)
        self._first_row = np.cumsum(self._rows) - self._rows
        self._seed, self._series = seed, series
        self.in_use = min(shuffle_shards, len(self._rows))
        """Number of shards that a slot reads from: G."""
        self.rows = int(self._rows.sum())
        """Number of rows of an epoch."""
        self._epoch = lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]
        self._slot = lru_cache(maxsize=2)(self._slot)  # type: ignore[method-assign]
        self._within = lru_cache(maxsize=self.in_use + 1)(self._within)  # type: ignore[method-assign]

    def indices(self, first_sample: int, count: int) -> np.ndarray:
        """The rows of samples first_sample to first_sample + count - 1, int64 of shape (count,)."""
        indices = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, slot, position = self._locate(first_sample + filled)
            piece = self._slot(epoch, slot)[position : position + count - filled]
            indices[filled : filled + len(piece)] = piece
            filled += len(piece)
        return indices

    def shards_from(self, sample: int) -> Iterator[int]:
        """An endless iterator of the shards in the order in which they are needed from this sample on.

        The first ``in_use`` are needed at once. A shard comes again when it enters again: in the next epoch or, for the
        last shards of an epoch, in its last slots.
        """
        epoch, slot, _ = self._locate(sample)
        while True:
            shards, _ = self._epoch(epoch)
            for before in range(self.in_use):
                yield int(shards[slot - before])
            for entering in range(slot + 1, len(shards)):
                yield int(shards[entering])
            epoch, slot = epoch + 1, 0

    def slot_of(self, sample: int) -> tuple[int, int]:
        """Epoch and slot of a sample. Samples with the same epoch and slot need the same shards."""
        return self._locate(sample)[:2]

    def _locate(self, sample: int) -> tuple[int, int, int]:
        """Epoch, slot, and position within the slot."""
        epoch, position = divmod(sample, self.rows)
        _, ends = self._epoch(epoch)
        slot = int(np.searchsorted(ends, position, side="right"))
        return epoch, slot, position - (int(ends[slot - 1]) if slot else 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of the epoch, and the position where each slot ends."""
        shards = random_order(len(self._rows), self._seed, epoch, Purpose.SHARD_ORDER, 0, self._series)
        sizes = np.zeros(len(shards), dtype=np.int64)
        for chunk in range(self.in_use):
            chunk_rows = self._chunk_ends(chunk) - self._chunk_ends(chunk - 1)
            sizes += chunk_rows[np.roll(shards, chunk)]
        return shards, np.cumsum(sizes)

    def _chunk_ends(self, chunk: int) -> np.ndarray:
        return (chunk + 1) * self._rows // self.in_use

    def _slot(self, epoch: int, slot: int) -> np.ndarray:
        """The rows of a slot, in order."""
        shards, _ = self._epoch(epoch)
        pieces = []
        for chunk in range(self.in_use):
            shard = int(shards[slot - chunk])
            start, end = (int(self._chunk_ends(number)[shard]) for number in (chunk - 1, chunk))
            pieces.append(self._within(epoch, shard)[start:end])
        rows = np.concatenate(pieces)
        return rows[random_order(len(rows), self._seed, epoch, Purpose.SLOT_ORDER, slot, self._series)]

    def _within(self, epoch: int, shard: int) -> np.ndarray:
        """The rows of a shard, as rows of the data set, in random order."""
        rows = random_order(int(self._rows[shard]), self._seed, epoch, Purpose.ROW_ORDER, shard, self._series)
        return rows + self._first_row[shard]
