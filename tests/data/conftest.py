"""A small data set of random ids in several shards, written by the MDSWriter of mosaicml-streaming."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from mythos.config.derive import global_batch_sequences, text_ids
from mythos.config.schema import Config
from mythos.data.format import COLUMN, SHARD_HASH, SPLITS, Manifest, Settings, Source, SplitCounts
from mythos.data.open import RunData, open_data

SEQUENCE_LENGTH = 15
ROWS = {"train": 103, "validation": 7}
SHARD_BYTES = 1024  # about 20 rows: six train shards
TOKENIZER = "not read unless text is written"  # the runs in tests/train/version_0_1 have its hash


def write_data_set(
    directory: Path,
    vocabulary_size: int = 4096,
    seed: int = 0,
    compression: str | None = None,
    rows: int = ROWS["train"],
    validation_rows: int = ROWS["validation"],
) -> Path:
    """Write a data set. Fewer validation rows are the first ones, and leave the train split as it is."""
    from streaming import MDSWriter

    counts = {"train": rows, "validation": validation_rows}
    manifest = Manifest(
        sequence_length=SEQUENCE_LENGTH,
        vocabulary_size=vocabulary_size,
        tokenizer_sha256=hashlib.sha256(TOKENIZER.encode()).hexdigest(),
        sources=(Source("some.parquet", 10, "0" * 16),),
        settings=Settings("text", 5.0, 1),
        splits={
            split: SplitCounts(3, 999, counts[split], counts[split] * (SEQUENCE_LENGTH + 1), 5, 2) for split in SPLITS
        },
        special_ids=(0, 1),
    )
    generator = np.random.default_rng(seed)
    dtype = manifest.encoding.split(":")[1]
    for split in SPLITS:
        writer = MDSWriter(
            columns={COLUMN: manifest.encoding},
            out=str(directory / split),
            compression=compression,
            hashes=[SHARD_HASH],
            size_limit=SHARD_BYTES,
        )
        for _ in range(counts[split]):
            writer.write({COLUMN: generator.integers(vocabulary_size, size=SEQUENCE_LENGTH + 1).astype(dtype)})
        writer.finish()
    (directory / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    manifest.save(directory)
    return directory


def open_run_data(config: Config) -> RunData:
    """The data of the run that a configuration describes."""
    return open_data(config.data, text_ids(config.model), config.seed, global_batch_sequences(config))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests, so it must not be changed."""
    return write_data_set(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def data_set(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))
