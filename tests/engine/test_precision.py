"""bf16 on ranks, as on GPUs: the loss follows that of fp32, counters stay exact, experts are chosen in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model.depth import fixed
from mythos.model.moe import expert_load, moe_layers
from mythos.plan.schedule import schedule
from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY, tiny_config
from tests.train.runs import curve, run_training


@pytest.mark.parametrize(
    ("model", "stage"),
    [("looped-moe", 3), ("looped-moe", 1), ("looped-moe", 0), ("mythos", 2), ("published", 3), ("dense", 0)],
)
def test_bf16_follows_the_fp32_curve(
    model: str, stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "bf16", "parallel__zero_stage": stage}
    if model in ("looped-moe", "mythos"):
        options["parallel__expert_parallel_size"] = 2
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=20, **options)
    assert two_ranks.run(run_training, config) == [0, 0]
    plain = [loss for loss, _ in train_plainly(config, 20)]
    assert curve(config, "train/loss") == pytest.approx(plain, rel=0.002)
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


def choices(config: Config) -> tuple[int, int, int]:
    """Of some training steps: calls of routers with gradient in the forward pass, those recomputed, and differences."""
    engine, chosen = TrainingEngine(config, torch.device("cpu")), []
    layers = moe_layers(engine.module)
    for number, layer in enumerate(layers):
        layer.router.register_forward_hook(
            lambda _, inputs, output, number=number: chosen.append((number, torch.is_grad_enabled(), output[1].clone()))
        )
    calls, recomputed, different = 0, 0, 0
    for step in range(5):
        tokens = torch.randint(VOCABULARY, (4, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(step))
        chosen.clear()
        loss = engine(tokens, tokens, fixed(5, 4)).total
        forward = [(number, experts) for number, with_gradient, experts in chosen if with_gradient]
        chosen.clear()
        engine.backward(loss)
        again = [(number, experts) for number, _, experts in chosen]
        engine.step(schedule(config.optim, step, config.train.steps))
        calls, recomputed = calls + len(forward), recomputed + len(again)
        for layer in range(len(layers)):
            pairs = zip(
                [experts for number, experts in forward if number == layer],
                [experts for number, experts in again if number == layer][::-1],
                strict=True,
            )
            different += sum(not torch.equal(first, second) for first, second in pairs)
    return calls, recomputed, different


@pytest.mark.parametrize("model", ["looped-moe", "mythos"])
def test_recomputation_chooses_the_same_experts(
    model: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "bf16", "parallel__expert_parallel_size": 2, "optim__learning_rate": 0.02}
    config = tiny_config(model, tiny_data, tmp_path, ranks=2, **options)
    for calls, recomputed, different in two_ranks.run(choices, config):
        assert calls == recomputed > 0
        assert different == 0
