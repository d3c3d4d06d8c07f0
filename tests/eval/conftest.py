"""A run whose data has a real tokenizer: sentences of the demo's text, most of which are shorter than a row."""

from pathlib import Path

import pytest

from mythos.config.schema import Config
from tests.data_prep.conftest import run, source, speeches, tokenizer, write_parquet  # noqa: F401
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_training

SEQUENCE_LENGTH, VALIDATION_PERCENT = 64, 20.0
OPTIONS = {"model__vocabulary_size": 512, "data__sequence_length": SEQUENCE_LENGTH, "eval__sequences": None}


def text_config(data: Path, run_directory: Path, ranks: int = 1, model: str = "looped", **overrides: object) -> Config:
    """A tiny run on the text."""
    return tiny_config(model, data, run_directory, ranks, **(OPTIONS | {"train__steps": 4} | overrides))


@pytest.fixture(scope="session")
def sentences(speeches: list[str]) -> list[str]:  # noqa: F811
    return [sentence for text in speeches[:2] for sentence in text.split(". ") if sentence.strip()]


@pytest.fixture(scope="session")
def text_data(sentences: list[str], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    directory = tmp_path_factory.mktemp("text")
    parquet = write_parquet(directory / "sentences.parquet", list(sentences))
    run([parquet], tokenizer, directory / "data", SEQUENCE_LENGTH, validation_percent=VALIDATION_PERCENT)
    return directory / "data"


@pytest.fixture(scope="session")
def text_run(one_rank: RankPool, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped model after four steps."""
    directory = tmp_path_factory.mktemp("text-run") / "run"
    assert one_rank.run(run_training, text_config(text_data, directory)) == [0]
    return directory
