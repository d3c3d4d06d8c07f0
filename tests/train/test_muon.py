"""Muon: every sharding against the plain form in one process, and its parts against closed forms."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, run_training

STEPS = 20
MUON: dict[str, Any] = {
    "train__steps": STEPS,
    "optim__kind": "muon",
    "optim__muon_momentum_warmup_steps": 8,
    "optim__beta1": 0.8,
    "optim__epsilon": 1e-10,
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO-0, EP 1": ("looped-moe", {"parallel__zero_stage": 0}),
    "ZeRO-0, EP 2": ("looped-moe", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 2}),
    "ZeRO-1, EP 2": ("looped-moe", {"parallel__zero_stage": 1, "parallel__expert_parallel_size": 2}),
    "ZeRO-2, EP 1": ("looped-moe", {"parallel__zero_stage": 2}),
    "ZeRO-2, EP 2": ("looped-moe", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 2}),
    "ZeRO-3, EP 1": ("looped-moe", {}),
    "ZeRO-3, EP 2": ("looped-moe", {"parallel__expert_parallel_size": 2}),
    "accumulation 2": ("looped-moe", {"train__micro_batch_sequences": 2}),
    "dense core, ZeRO-3": ("looped", {}),
    "baseline, ZeRO-2": ("dense", {"parallel__zero_stage": 2}),
}


@lru_cache
def plain_curve(model: str, data: Path) -> list[tuple[float, float]]:
    return train_plainly(tiny_config(model, data, Path("unused"), **MUON), STEPS)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_like_one_plain_process(
    form: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    model, overrides = FORMS[form]
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, **(MUON | overrides))
    assert two_ranks.run(run_training, config) == [0, 0]
    plain = plain_curve(model, tiny_data)
    assert curve(config, "train/loss") == pytest.approx([loss for loss, _ in plain], rel=1e-4)
    assert curve(config, "train/gradient_norm") == pytest.approx([norm for _, norm in plain], rel=1e-3)
    assert plain[-1][0] < plain[0][0] - 0.3, "it must learn"
