"""A prepared data set of random ids, written without mosaicml-streaming, which a machine with a GPU may lack."""

import hashlib
from pathlib import Path

import numpy as np

from data_prep.shards import ShardFormat, encode_shard, write_index
from mythos.data.format import SPLITS, TOKENIZER_FILE, Manifest, Settings, Source, SplitCounts, token_dtype
from mythos.files import write_atomically
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY

TOKENIZER = "not read"
ROWS = {"train": 128, "validation": 8}


def write_random_tokens(directory: Path) -> Path:
    """A data set for ``tiny_config``."""
    manifest = Manifest(
        sequence_length=SEQUENCE_LENGTH,
        vocabulary_size=VOCABULARY,
        tokenizer_sha256=hashlib.sha256(TOKENIZER.encode()).hexdigest(),
        sources=(Source("random", 1, "0" * 16),),
        settings=Settings("text", 5.0, 1),
        splits={split: SplitCounts(1, 1, count, count * (SEQUENCE_LENGTH + 1), 0, 0) for split, count in ROWS.items()},
    )
    dtype = token_dtype(VOCABULARY)
    row_bytes = (SEQUENCE_LENGTH + 1) * np.dtype(dtype).itemsize
    layout = ShardFormat(manifest.encoding, row_bytes, 1 << 20, None)
    generator = np.random.default_rng(0)
    for split in SPLITS:
        (directory / split).mkdir(parents=True)
        rows = generator.integers(VOCABULARY, size=(ROWS[split], SEQUENCE_LENGTH + 1)).astype(dtype)
        name, content, entry = encode_shard(layout, 0, rows)
        write_atomically(directory / split / name, content)
        write_index(directory / split, [entry])
    write_atomically(directory / TOKENIZER_FILE, TOKENIZER)
    manifest.save(directory)
    return directory
