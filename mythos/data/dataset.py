"""The rows of one split of a prepared data set.

There is no shared memory and no import of `streaming` (5 s and 700 MiB in each process). Every problem with the files
is raised in the caller as one line.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from pathlib import Path

import numpy as np

from mythos.data.format import INDEX_FILE, SPLITS, Answers, Manifest, fingerprint
from mythos.data.shards import InPlace, OpenShard, Storage, read_index
from mythos.errors import UserError

KEEP_OPEN = 8
"""Shards that stay open for random access, without ``prepare``."""


def text_targets(rows: np.ndarray, special_ids: Sequence[int]) -> int:
    """At how many positions of rows, of shape (..., sequence_length + 1), the target is none of the special ids."""
    return int(np.isin(rows[..., 1:], special_ids, invert=True).sum())


def answer_targets(rows: np.ndarray, answers: Answers) -> np.ndarray:
    """Which targets of rows, (..., sequence_length + 1), belong to an answer: bool, (..., sequence_length)."""
    inside = np.cumsum(rows == answers.begin_id, axis=-1) > np.cumsum(rows == answers.end_id, axis=-1)
    return inside[..., :-1] & inside[..., 1:]


class TokenDataset:
    """``dataset[i]`` is row i, an int64 array of ``sequence_length + 1`` token ids.

    Construction checks the manifest, the index and, for a directory, that every shard exists with its size. A shard's
    hash is checked whenever the shard is opened. Every failure is a UserError that names the file.

    Only one thread at a time may read; ``prepare`` opens shards ahead of it in other threads.

    Args:
        directory: of the manifest and the indexes.
        storage: access to the shards; by default they are read from ``directory``.
    """

    def __init__(self, directory: Path, split: str, storage: Storage | None = None) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r}: a data set holds {' and '.join(SPLITS)}")
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        self.sequence_length = self.manifest.sequence_length
        self._place = self.directory / split
        self._remedy = f"remove {self.directory} and run `mythos data prepare` again"
        self._storage = storage or InPlace(self._place, self._remedy)
        self.shards = read_index(self._place / INDEX_FILE, self.manifest, self._remedy)
        self._storage.check(self.shards)
        self._dtype = np.dtype(self.manifest.encoding.split(":")[1]).newbyteorder("<")
        self._rows = np.array([shard.rows for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self._rows)
        self._open: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._ready: dict[int, OpenShard] = {}
        self._keep_open = KEEP_OPEN
        expected = self.manifest.splits[split].sequences
        if not 0 < len(self) == expected:
            raise UserError(f"{self._place}: {len(self)} rows, the manifest has {expected}; {self._remedy}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the whole data set, both splits; see ``mythos.data.format.fingerprint``."""
        return fingerprint(self.directory)

    def __getitem__(self, index: int) -> np.ndarray:
        """Row ``index``, an int64 array of shape (sequence_length + 1,). Raises IndexError outside [0, len)."""
        return self.read([index])[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those rows, int64 of shape (len(indices), sequence_length + 1). Raises IndexError outside [0, len)."""
        wanted = np.asarray(indices, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"row {outside[0]} of {len(self)}")
        numbers = np.searchsorted(self._ends, wanted, side="right")
        places = wanted - (self._ends - self._rows)[numbers]
        rows = np.empty((len(wanted), self.manifest.row_tokens), dtype=self._dtype)
        for row, number, place in zip(rows, numbers.tolist(), places.tolist(), strict=True):
            (self._ready.get(number) or self._opened(number)).read(place, row)
        return rows.astype(np.int64)

    def prepare(self, numbers: Iterable[int], executor: Executor) -> None:
        """Open these shards in the background, and close all others. Errors are raised when a row is read."""
        wanted = list(dict.fromkeys(numbers))
        self._keep_open = len(wanted)
        for number in set(self._open) - set(wanted):  # first, so that a cache can free their space
            self._close(number)
        for number in wanted:
            if number not in self._open:
                self._open[number] = executor.submit(self._open_shard, number)

    def close(self) -> None:
        """Close all files."""
        for number in list(self._open):
            self._close(number)

    def _opened(self, number: int) -> OpenShard:
        ahead = self._open.get(number)
        if ahead is not None and ahead.done() and ahead.exception() is not None:
            del self._open[number]  # opening it ahead of time failed: try once more, now that it is needed
        if number not in self._open:
            while len(self._open) >= self._keep_open:
                self._close(next(iter(self._open)))
            self._open[number] = Future()
            try:
                self._open[number].set_result(self._open_shard(number))
            except BaseException:
                del self._open[number]
                raise
        self._ready[number] = self._open[number].result()
        return self._ready[number]

    def _open_shard(self, number: int) -> OpenShard:
        shard = self.shards[number]
        return OpenShard(self._storage.open(shard), shard, str(self._place / shard.raw.name), self._remedy)

    def _close(self, number: int) -> None:
        self._ready.pop(number, None)
        future = self._open.pop(number)
        if not future.cancel():
            future.add_done_callback(_close_shard)


def _close_shard(future: "Future[OpenShard]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
