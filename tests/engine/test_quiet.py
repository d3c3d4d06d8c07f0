"""DeepSpeed prints nothing that a user cannot act on."""

import logging
from pathlib import Path

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from tests.spawn import RankPool
from tests.tiny import tiny_config


class Recorder(logging.Handler):
    """Keeps the messages that pass the logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def printed(config: Config) -> list[str]:
    """The messages of DeepSpeed while an engine is built."""
    logger, recorder = logging.getLogger("DeepSpeed"), Recorder()
    logger.addHandler(recorder)
    try:
        TrainingEngine(config, torch.device("cpu"))
    finally:
        logger.removeHandler(recorder)
    return recorder.messages


@pytest.mark.parametrize("model", ["looped-moe", "mythos"])
def test_a_model_with_experts_starts_without_warnings(
    model: str, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    """On one rank the expert-parallel size is 1; in the mythos model the experts are grouped."""
    assert one_rank.run(printed, tiny_config(model, tiny_data, tmp_path)) == [[]]
