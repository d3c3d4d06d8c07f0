"""Token rows from a prepared data set, in an order that depends on the seed alone.

The MDS shards are read by a small memory-mapped reader: no threads, no shared memory, no import of `streaming`
(5 s and 840 MB a process). Whatever is wrong with the files is raised in the caller as one line.

An MDS shard of ``rows`` samples is: uint32 rows | uint32 offsets[rows + 1] | JSON config | samples. Our only column has
a fixed size, so the samples are a plain matrix at the end of the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mythos.data.format import COLUMN, INDEX_FILE, SHARD_HASH, SPLITS, Manifest, parse_json_object, read_data_file
from mythos.errors import UserError

_HASH_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class _Shard:
    path: Path
    bytes: int
    xxh3_64: str
    rows: int


class TokenDataset:
    """The rows of one split: ``dataset[i]`` is an int64 array of ``sequence_length + 1`` token ids.

    Construction checks the manifest, the index, and that every shard is there with its size. A shard's hash is checked
    when it is first used. Every failure is a UserError that names the file.
    """

    def __init__(self, directory: Path, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r}: a data set holds {' and '.join(SPLITS)}")
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        self.sequence_length = self.manifest.sequence_length
        self._dtype = np.dtype(self.manifest.encoding.split(":")[1]).newbyteorder("<")
        self._row_bytes = self.manifest.row_tokens * self._dtype.itemsize
        self._remedy = f"remove {self.directory} and run `mythos data prepare` again"
        self._shards = self._read_index(self.directory / split / INDEX_FILE)
        for shard in self._shards:
            self._check_size(shard)
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._matrices: list[np.ndarray | None] = [None] * len(self._shards)
        expected = self.manifest.splits[split].sequences
        if not 0 < len(self) == expected:
            raise UserError(f"{self.directory / split}: {len(self)} rows, the manifest has {expected}; {self._remedy}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """Row ``index``, an int64 array of shape (sequence_length + 1,). Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        matrix = self._matrices[number]
        if matrix is None:
            matrix = self._matrices[number] = self._open(self._shards[number])
        first_row = self._ends[number] - self._shards[number].rows
        return matrix[index - first_row].astype(np.int64)

    def _read_index(self, path: Path) -> list[_Shard]:
        index = parse_json_object(path, read_data_file(path), self._remedy)
        entries = index.get("shards")
        if index.get("version") != 2 or not isinstance(entries, list):
            raise UserError(f"{path}: not an MDS index of version 2; {self._remedy}")
        return [self._parse_shard(path, number, entry) for number, entry in enumerate(entries)]

    def _parse_shard(self, path: Path, number: int, entry: Any) -> _Shard:
        expected = {
            "format": "mds",
            "compression": None,
            "column_names": [COLUMN],
            "column_encodings": [self.manifest.encoding],
            "column_sizes": [self._row_bytes],
        }
        try:
            for name, value in expected.items():
                if entry[name] != value:
                    raise UserError(
                        f"{path}: shard {number}: {name} is {entry[name]!r}, this data set needs {value!r}; "
                        f"{self._remedy}"
                    )
            raw = entry["raw_data"]
            return _Shard(
                path=path.parent / str(raw["basename"]),
                bytes=int(raw["bytes"]),
                xxh3_64=str(raw["hashes"][SHARD_HASH]),
                rows=int(entry["samples"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: shard {number}: damaged entry ({error!r}); {self._remedy}") from error

    def _check_size(self, shard: _Shard) -> None:
        try:
            found_bytes = shard.path.stat().st_size
        except OSError as error:
            raise UserError(f"{shard.path}: the index names it, but {error.strerror}; {self._remedy}") from error
        if found_bytes != shard.bytes:
            raise UserError(f"{shard.path}: {found_bytes} bytes, the index says {shard.bytes}; {self._remedy}")

    def _open(self, shard: _Shard) -> np.ndarray:
        """Check the shard's hash and map its samples: a read-only array of shape (rows, sequence_length + 1)."""
        self._check_size(shard)  # a file cut since construction would raise no error but a signal, once mapped
        digest = xxhash.xxh3_64()
        with shard.path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != shard.xxh3_64:
            raise UserError(f"{shard.path}: damaged, its hash differs from the index; {self._remedy}")
        samples_start = shard.bytes - shard.rows * self._row_bytes
        with shard.path.open("rb") as file:
            header = np.fromfile(file, dtype="<u4", count=2)
        if header.tolist() != [shard.rows, samples_start]:
            raise UserError(f"{shard.path}: its header disagrees with the index; {self._remedy}")
        shape = (shard.rows, self.manifest.row_tokens)
        return np.memmap(shard.path, dtype=self._dtype, mode="r", offset=samples_start, shape=shape)


class OrderedStream:
    """An endless run of samples: every epoch is a fresh permutation of the data set.

    Sample ``n``, counted over the whole run, is row ``permutation(seed, n // len)[n % len]``. There is no other state
    and no notion of ranks: whoever asks for the same sample numbers gets the same rows, at any world size and after any
    resume. Epochs follow each other without a gap, so a batch may span two.
    """

    def __init__(self, dataset: TokenDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._cached_epoch = -1
        self._cached_permutation = np.empty(0, dtype=np.int64)

    def indices(self, first_sample: int, count: int) -> np.ndarray:
        """The dataset indices of samples first_sample to first_sample + count - 1, int64 of shape (count,)."""
        indices = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, position = divmod(first_sample + filled, len(self.dataset))
            piece = self._permutation(epoch)[position : position + count - filled]
            indices[filled : filled + len(piece)] = piece
            filled += len(piece)
        return indices

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        """The rows of those samples, int64 of shape (count, sequence_length + 1)."""
        rows = np.empty((count, self.dataset.sequence_length + 1), dtype=np.int64)
        for place, index in enumerate(self.indices(first_sample, count)):
            rows[place] = self.dataset[int(index)]
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._cached_epoch:
            # Philox takes the pair as its key: no two (seed, epoch) share a stream, as seed + epoch would.
            generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
            self._cached_permutation = generator.permutation(len(self.dataset))
            self._cached_epoch = epoch
        return self._cached_permutation
