"""A part of the demo text: a few complete speeches, some of which are in the validation split."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_prep.documents import split_of
from data_prep.prepare import prepare
from data_prep.train_tokenizer import train_tokenizer
from data_prep.workers import Workers
from mythos.data.format import Manifest, Settings
from mythos.ranks.world import World

DEMO = Path(__file__).parents[2] / "demo" / "sotu.parquet"
VALIDATION_PERCENT = 5.0
SEQUENCE_LENGTH = 64
BARE = World("bare", 0, 1, 0, 1, "127.0.0.1", 0)
SETTINGS = Settings("text", VALIDATION_PERCENT, 32)


def write_parquet(path: Path, texts: list[str | None], row_group_documents: int = 4) -> Path:
    # Uncompressed and with plain encoding, so that a test can find and damage the bytes of a row group.
    table = pa.table({"id": [str(number) for number in range(len(texts))], "text": texts})
    parquet.write_table(
        table, path, row_group_size=row_group_documents, compression="none", use_dictionary=False, store_schema=False
    )
    return path


def run(
    sources: list[Path],
    tokenizer: Path,
    output: Path,
    sequence_length: int = SEQUENCE_LENGTH,
    processes: int = 1,
    **settings: Any,
) -> tuple[Manifest, bool]:
    """Prepare a data set with SETTINGS and the given changes."""
    with Workers(BARE, processes) as workers:
        return prepare(sources, tokenizer, output, sequence_length, dataclasses.replace(SETTINGS, **settings), workers)


def content_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """12 train and 2 validation speeches, all short, in the order of the file."""
    texts = parquet.read_table(DEMO, columns=["text"]).column("text").to_pylist()
    short = [text for text in texts if len(text) < 14_000]
    train = [text for text in short if split_of(text, VALIDATION_PERCENT) == "train"][:12]
    validation = [text for text in short if split_of(text, VALIDATION_PERCENT) == "validation"][:2]
    assert (len(train), len(validation)) == (12, 2)
    return [text for text in short if text in train or text in validation]


@pytest.fixture(scope="session")
def source(speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("source") / "speeches.parquet", list(speeches))


@pytest.fixture(scope="session")
def tokenizer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([source], "text", 512, path, VALIDATION_PERCENT)
    return path


@pytest.fixture(scope="session")
def several_sources(speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven files, and so seven parts, of about 0.5 MB, each with several variants of the speeches."""
    directory = tmp_path_factory.mktemp("several")
    return [
        write_parquet(
            directory / f"{file}.parquet", [f"Edition {file}.{n}. {text}" for n in range(6) for text in speeches]
        )
        for file in range(7)
    ]
