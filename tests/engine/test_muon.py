"""Muon: every form of sharding against the plain form in one process, and its parts against closed forms."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.engine.exchange import FlatSlice, choose_owners, matrices_of
from mythos.engine.muon import orthogonalise
from mythos.engine.optimizer import build_optimizer
from mythos.model import build_model
from mythos.model.depth import fixed
from mythos.plan.schedule import EXPERTS, MATRICES, OTHERS, learning_rate, schedule
from tests.reference.muon import newton_schulz
from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY, tiny_config
from tests.train.runs import curve, run_training
from tests.train.test_resume import EXACT, as_if_killed_after

STEPS = 20
MUON: dict[str, Any] = {
    "train__steps": STEPS,
    "optim__kind": "muon",
    "optim__muon_momentum_warmup_steps": 8,
    "optim__beta1": 0.8,
    "optim__epsilon": 1e-10,
    "optim__muon_beta2": 0.95,
    "optim__muon_decay_by_shape": True,
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO-0, EP 1": ("looped-moe", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 1}),
    "ZeRO-0, EP 2": ("looped-moe", {"parallel__zero_stage": 0, "parallel__expert_parallel_size": 2}),
    "ZeRO-1, EP 2": ("looped-moe", {"parallel__zero_stage": 1, "parallel__expert_parallel_size": 2}),
    "ZeRO-2, EP 1": ("looped-moe", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 1}),
    "ZeRO-2, EP 2": ("looped-moe", {"parallel__zero_stage": 2, "parallel__expert_parallel_size": 2}),
    "ZeRO-3, EP 1": ("looped-moe", {"parallel__expert_parallel_size": 1}),
    "ZeRO-3, EP 2": ("looped-moe", {"parallel__expert_parallel_size": 2}),
    "accumulation 2": ("looped-moe", {"train__micro_batch_sequences": 2}),
    "all options, ZeRO-3, EP 2": ("mythos", {"parallel__expert_parallel_size": 2}),
    "published, ZeRO-3": ("published", {}),
    "baseline, ZeRO-2": ("dense", {"parallel__zero_stage": 2}),
    "without the second moment": ("looped-moe", {"optim__muon_beta2": 0.0, "optim__muon_decay_by_shape": False}),
}


@lru_cache
def plain_curve(model: str, data: Path, beta2: float, by_shape: bool) -> list[tuple[float, float]]:
    options = MUON | {"optim__muon_beta2": beta2, "optim__muon_decay_by_shape": by_shape}
    return train_plainly(tiny_config(model, data, Path("unused"), **options), STEPS)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_like_one_plain_process(
    form: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    model, overrides = FORMS[form]
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, **(MUON | overrides))
    assert two_ranks.run(run_training, config) == [0, 0]
    plain = plain_curve(model, tiny_data, config.optim.muon_beta2, config.optim.muon_decay_by_shape)
    assert curve(config, "train/loss") == pytest.approx([loss for loss, _ in plain], rel=1e-4)
    assert curve(config, "train/gradient_norm") == pytest.approx([norm for _, norm in plain], rel=1e-3)
    assert plain[-1][0] < plain[0][0] - 0.15, "the loss falls"


@pytest.mark.parametrize(("model", "stage"), [("looped-moe", 3), ("dense", 0)])
def test_bf16_follows_the_fp32_curve(
    model: str, stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = MUON | {"precision": "bf16", "parallel__zero_stage": stage, "train__steps": 10}
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, **options)
    assert two_ranks.run(run_training, config) == [0, 0]
    plain = train_plainly(config, 10)
    assert curve(config, "train/loss") == pytest.approx([loss for loss, _ in plain], rel=0.02)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resumed_equals_uninterrupted_to_the_last_bit(
    stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = MUON | {"parallel__zero_stage": stage, "train__steps": 6, "checkpoint__every": 3, "eval__every": 3}
    straight = tiny_config("looped-moe", tiny_data, tmp_path / "straight", ranks=2, **options)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, 3, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    for name in EXACT:
        assert curve(resumed, name) == curve(straight, name), name


def good_then_bad_step(config: Config) -> tuple[list[bool], list[bool], int]:
    """Whether two steps were applied (the second loss is NaN), what the second left as it was, number of momenta."""
    engine = TrainingEngine(config, torch.device("cpu"))
    inner = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)

    def snapshot() -> list[torch.Tensor]:
        state = [value for values in inner.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in (*state, *(key for key in inner.state))]

    applied, snapshots = [], []
    tokens = torch.randint(VOCABULARY, (4, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))
    for factor in (1.0, math.nan):
        engine.backward(engine(tokens, tokens, fixed(2, 4)).total * factor)
        applied.append(engine.step(schedule(config.optim, 10, STEPS)).applied)
        snapshots.append(snapshot())
    momenta = sum("exp_avg" in state and "exp_avg_sq" not in state for state in inner.state.values())
    return applied, [torch.equal(before, after) for before, after in zip(*snapshots, strict=True)], momenta


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_leaves_weights_and_momentum_as_they_were(
    stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped-moe", tiny_data, tmp_path, ranks=2, **(MUON | {"parallel__zero_stage": stage}))
    for applied, unchanged, momenta in two_ranks.run(good_then_bad_step, config):
        assert applied == [True, False]
        assert momenta >= 2
        assert all(unchanged)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48), (1, 8)])
def test_orthogonal_form_against_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    for matrix, found in zip(matrices, orthogonalise(matrices), strict=True):
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        inside = left.T @ found.double() @ right.T  # diagonal: the vectors are kept, the values become nearly 1
        assert inside.diagonal().min() > 0.8
        assert inside.diagonal().max() < 1.2
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-3
        torch.testing.assert_close(found.double(), newton_schulz(matrix), atol=2e-4, rtol=0)
    assert torch.equal(orthogonalise(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_orthogonal_form_does_not_depend_on_the_batch_or_the_scale() -> None:
    matrices = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalise(matrices * 1e-12), alone, atol=1e-4, rtol=0)
    in_bf16 = orthogonalise(matrices.bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(in_bf16.flatten(), alone.flatten(), dim=0) > 0.99


def test_momentum_and_decay_by_hand(tiny_data: Path) -> None:
    options: dict[str, Any] = {"optim__kind": "muon", "train__steps": 1000, "optim__warmup_steps": 0}
    optim = tiny_config("dense", tiny_data, Path("unused"), **options).optim
    by_hand = {
        0: (8e-3, 0.85, 0.2),
        150: (8e-3, 0.90, 0.17),
        300: (8e-3, 0.95, 0.14),
        500: (8e-3, 0.95, 0.1),
        750: (4e-3, 0.95, 0.05),
        999: (1.6e-5, 0.95, 0.0002),
    }
    for step, expected in by_hand.items():
        by_group = schedule(optim, step, 1000)
        for name in (MATRICES, EXPERTS):
            assert [by_group[name][key] for key in ("lr", "momentum", "weight_decay")] == pytest.approx(expected)
        assert by_group[OTHERS] == {"lr": learning_rate(optim, step, 1000)}
    adamw = tiny_config("dense", tiny_data, Path("unused")).optim
    rate = {"lr": learning_rate(adamw, 0, 1000)}
    assert schedule(adamw, 0, 1000) == {MATRICES: rate, EXPERTS: rate, OTHERS: rate}


def test_which_parameters_muon_and_adamw_update(tiny_data: Path) -> None:
    config = tiny_config("looped-moe", tiny_data, Path("unused"), **MUON)
    model = build_model(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rest, matrices, experts = (
        {names[id(parameter)] for parameter in group["params"]}
        for group in build_optimizer(model, config.optim).param_groups
    )
    assert len(rest) + len(matrices) + len(experts) == len(names)
    assert all(".experts." in name for name in experts)
    assert len(experts) == 4
    assert all(".attention." in name or ".feed_forward." in name for name in matrices)
    assert "loop.core.0.feed_forward.shared_experts.down.weight" in matrices
    assert {name for name in rest if model.get_parameter(name).ndim > 1} == {
        "embedding.weight",
        "loop.injection.input.weight",
        "readout.weight",
        *(f"loop.core.{block}.feed_forward.router.weight" for block in (0, 1)),
    }


def test_matrices_of_a_parameter_and_their_owners() -> None:
    # (2, 6, 4), gate and up fused: 4 matrices of 3 x 4; elements 10 to 30 are at position 100 of the flat tensor
    matrices = matrices_of([FlatSlice((2, 6, 4), 2, 10, 30, 100)])
    assert [(m.rows, m.columns, m.start, m.stop) for m in matrices] == [
        (3, 4, 10, 12),
        (3, 4, 0, 12),
        (3, 4, 0, 6),
        (3, 4, 0, 0),
    ]
    assert [m.origin + m.start for m in matrices[:3]] == [100, 102, 114]
    big, small = (matrices_of([FlatSlice(shape, 1, 0, 64, 0)]) for shape in ((8, 8), (4, 4, 4)))
    owners = choose_owners([*small, *big], 2)
    assert owners == [1, 1, 1, 1, 0], "the big matrix costs more than all the small ones"
