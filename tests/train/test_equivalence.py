"""Every parallel form against plain training: one process, whole batch, no DeepSpeed."""

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from mythos import loss
from mythos.config.schema import Config
from mythos.engine import engine
from tests.experts import experts_as_on_a_gpu
from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training

STEPS = 10
A_SEQUENCE_AT_A_TIME = {"train__micro_batch_sequences": 1}
"""Ranks often have no sequence that is due at a loop step with gradient where others have one."""
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO-3, EP 2": ("looped-moe", {"parallel__expert_parallel_size": 2}),
    "ZeRO-3, EP 1": ("looped-moe", {"parallel__expert_parallel_size": 1}),
    "ZeRO-2, EP 2": ("looped-moe", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 2}),
    "ZeRO-1, EP 2": ("looped-moe", {"parallel__zero_stage": 1, "parallel__expert_parallel_size": 2}),
    "ZeRO-0, EP 2": ("looped-moe", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 2}),
    "ZeRO-0, EP 1": ("looped-moe", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 1}),
    "accumulation 2": ("looped-moe", {"parallel__expert_parallel_size": 2, "train__micro_batch_sequences": 2}),
    "a sequence at a time, EP 2": (
        "looped-moe",
        {"parallel__expert_parallel_size": 2, "loop__recompute": False} | A_SEQUENCE_AT_A_TIME,
    ),
    "a sequence at a time, all options, ZeRO-2, EP 2": (
        "mythos",
        {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 2} | A_SEQUENCE_AT_A_TIME,
    ),
    "ZeRO-0, accumulation 2": ("looped-moe", {"parallel__zero_stage": 0, "train__micro_batch_sequences": 2}),
    "no recomputation": ("looped-moe", {"parallel__expert_parallel_size": 2, "loop__recompute": False}),
    "one depth per batch": ("looped-moe", {"parallel__expert_parallel_size": 2, "loop__depth": "poisson_per_batch"}),
    "all options, ZeRO-3, EP 2": ("mythos", {"parallel__expert_parallel_size": 2}),
    "all options, ZeRO-2, EP 1": ("mythos", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 1}),
    "newer options, ZeRO-3, EP 2": ("newer", {"parallel__expert_parallel_size": 2}),
    "newer options, ZeRO-2, EP 2": ("newer", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 2}),
    "newer options, ZeRO-1, EP 1": ("newer", {"parallel__zero_stage": 1, "parallel__expert_parallel_size": 1}),
    "newer options, ZeRO-0, EP 2": ("newer", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 2}),
    "published, ZeRO-3": ("published", {}),
    "dense core, ZeRO-3": ("looped", {}),
    "dense core, ZeRO-0": ("looped", {"parallel__zero_stage": 0}),
    "baseline, ZeRO-3": ("dense", {}),
    "baseline, ZeRO-0": ("dense", {"parallel__zero_stage": 0}),
}


@lru_cache
def plain_curve(model: str, data: Path, depth: str | None) -> list[tuple[float, float]]:
    overrides = {} if depth is None else {"loop__depth": depth}
    return train_plainly(tiny_config(model, data, Path("unused"), train__steps=STEPS, **overrides), STEPS)


def check_against_plain(config: Config, model: str, data: Path, depth: str | None = None) -> None:
    plain = plain_curve(model, data, depth)
    assert curve(config, "train/loss") == pytest.approx([value for value, _ in plain], rel=1e-5)
    assert curve(config, "train/gradient_norm") == pytest.approx([norm for _, norm in plain], rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_like_one_plain_process(
    form: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    model, overrides = FORMS[form]
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=STEPS, **overrides)
    assert two_ranks.run(run_training, config) == [0, 0]
    check_against_plain(config, model, tiny_data, overrides.get("loop__depth"))
    if model != "dense":
        assert len(set(curve(config, "depth/mean"))) > 3, "the depth must change from step to step"
        assert max(curve(config, "depth/done_over_due")) <= 1.02


def train_with_experts_as_on_a_gpu(config: Config) -> int:
    with experts_as_on_a_gpu():
        return run_training(config)


@pytest.mark.parametrize(
    "form",
    [
        "ZeRO-3, EP 2",
        "ZeRO-0, EP 1",
        "a sequence at a time, EP 2",
        "a sequence at a time, all options, ZeRO-2, EP 2",
        "no recomputation",
        "all options, ZeRO-3, EP 2",
        "newer options, ZeRO-1, EP 1",
    ],
)
def test_the_form_that_gpus_use_trains_like_one_plain_process(
    form: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    model, overrides = FORMS[form]
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=STEPS, **overrides)
    assert two_ranks.run(train_with_experts_as_on_a_gpu, config) == [0, 0]
    check_against_plain(config, model, tiny_data)


@pytest.mark.parametrize("model", ["looped-moe", "mythos", "dense"])
def test_one_rank_trains_like_the_plain_process(
    model: str, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(model, tiny_data, tmp_path / "run", train__steps=STEPS)
    assert one_rank.run(run_training, config) == [0]
    check_against_plain(config, model, tiny_data)


def train_compiled(config: Config) -> int:
    """With the graphs as they are: generated code for them takes a minute; tests/model/test_compilation.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "compiles", lambda *_: True)
        patch.setattr(engine, "compile_blocks", partial(engine.compile_blocks, backend="aot_eager"))
        return run_training(config)


def test_compiled_blocks_train_the_same_under_zero_3(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=STEPS)
    assert two_ranks.run(train_compiled, config) == [0, 0]
    check_against_plain(config, "looped-moe", tiny_data)


def train_with_chunked_loss(config: Config) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_LOGITS, "cpu", 10 * VOCABULARY)
        return run_training(config)


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_the_loss_in_chunks_trains_the_same_under_zero_3(
    z_loss: float, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=6, train__z_loss=z_loss)
    assert two_ranks.run(train_with_chunked_loss, config) == [0, 0]
    plain = train_plainly(config, 6)
    assert curve(config, "train/loss") == pytest.approx([value for value, _ in plain], rel=1e-5), "without the z-loss"
    if z_loss:  # at the start all logits are near 0
        assert curve(config, "train/z_loss")[0] == pytest.approx(z_loss * math.log(VOCABULARY) ** 2, rel=0.1)
    else:
        assert curve(config, "train/z_loss") == []
    assert curve(config, "train/gradient_norm") == pytest.approx([norm for _, norm in plain], rel=1e-4)
