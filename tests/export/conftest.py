"""Exports of tiny models without a run."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from mythos.checkpoint.plain import values_of
from mythos.config.load import to_dict
from mythos.config.schema import Config
from mythos.config.yaml_file import dump
from mythos.data.format import BOS
from mythos.export.hugging_face import write_description
from mythos.export.weights import write_weights
from mythos.model import build_model
from tests.export.load_in_transformers import TEXTS
from tests.model.helpers import randomise
from tests.spawn import RankPool
from tests.text_tokenizer import text_tokenizer
from tests.tiny import tiny_config
from tests.train.runs import run_some_steps

VOCABULARY = 300


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    """Bytes, and the most frequent pairs of the texts."""
    return text_tokenizer(TEXTS, VOCABULARY)


def write_export(config: Config, tokenizer: Tokenizer, directory: Path) -> None:
    """An export for transformers, with random weights in all parameters and several files."""
    model = randomise(build_model(config), deviation=0.3)
    for buffer in values_of(model).keys() - dict(model.named_parameters()):
        values_of(model)[buffer].copy_(torch.linspace(-0.1, 0.1, 4))  # the balance biases of four experts
    if config.model.kind == "looped" and config.model.halting:
        nn.init.constant_(model.get_submodule("loop.halting.gate").bias, -2.0)  # tokens halt after nine steps
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(to_dict(config)), encoding="utf-8")
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_description(directory, config, torch.float32, BOS, BOS)
    tensors = ((name, tensor.detach().clone()) for name, tensor in values_of(model).items())
    write_weights(tensors, directory, "model.", file_bytes=40_000)


@pytest.fixture(scope="package")
def trained(
    two_ranks: RankPool, tokenizer: Tokenizer, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with checkpoints after 2, 4 and 5 steps: exports are written into it, nothing else is changed."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    options = {"parallel__expert_parallel_size": 2, "checkpoint__every": 2, "checkpoint__keep_last": 9}
    config = tiny_config("looped-moe", tiny_data, directory, ranks=2, model__vocabulary_size=VOCABULARY, **options)
    two_ranks.run(run_some_steps, config, 5)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return directory
