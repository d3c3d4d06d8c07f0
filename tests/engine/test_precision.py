"""bf16 with fp32 optimizer state, as on GPUs: the loss follows that of fp32; counters and balance biases stay exact."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.model.depth import fixed
from mythos.model.moe import expert_load, moe_layers
from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, tiny_config
from tests.train.runs import curve, run_training


@pytest.mark.parametrize(("model", "stage"), [("looped-moe", 3), ("looped-moe", 2), ("looped", 3), ("dense", 0)])
def test_bf16_follows_the_fp32_curve(
    model: str, stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "bf16", "parallel__zero_stage": stage}
    if model == "looped-moe":
        options["parallel__expert_parallel_size"] = 2
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=20, **options)
    assert two_ranks.run(run_training, config) == [0, 0]
    plain = [loss for loss, _ in train_plainly(config, 20)]
    assert curve(config, "train/loss") == pytest.approx(plain, rel=0.02)
    assert all(norm > 0 for norm in curve(config, "train/gradient_norm"))


def count_tokens(config: Config) -> tuple[list[torch.dtype], list[float]]:
    engine = TrainingEngine(config, torch.device("cpu"))
    tokens = torch.zeros(4, SEQUENCE_LENGTH, dtype=torch.long)
    with engine.evaluation():
        for _ in range(2):
            engine(tokens, tokens, fixed(20, 4))
    types = [layer.router.e_score_correction_bias.dtype for layer in moe_layers(engine.module)]
    return types, expert_load(engine.module).sum(dim=1).tolist()


def test_counters_and_balance_biases_stay_in_fp32(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16", "parallel__expert_parallel_size": 2}
    config = tiny_config("looped-moe", tiny_data, tmp_path, ranks=2, **options)
    for types, load in two_ranks.run(count_tokens, config):
        assert types == [torch.float32, torch.float32]
        assert load == [20 * 4 * SEQUENCE_LENGTH * 2] * 2, "bf16 could not count beyond 256"


def refusal(config: Config) -> str:
    try:
        TrainingEngine(config, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return "no error"


def test_a_stage_that_clips_without_the_experts_is_refused(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped-moe", tiny_data, tmp_path, ranks=2, precision="bf16", parallel__zero_stage=0)
    for message in two_ranks.run(refusal, config):
        assert message.startswith("parallel.zero_stage = 0: in bf16 DeepSpeed clips by a norm without the experts'")
