"""A run resumes on any number of ranks, expert-parallel size and ZeRO stage with the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.checkpoint import layout
from mythos.checkpoint import restore as checkpoint
from mythos.checkpoint.reader import CheckpointReader
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import PREEMPTED, UserError
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, run_some_steps, run_training

STEPS = 18
TOLERANCE = {"train/loss": 1e-6, "val/loss_depth_3": 1e-6, "train/gradient_norm": 1e-4, "moe/load_max_over_mean": 1e-6}
"""Relative: another layout sums in another order."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optim__kind": "muon", "optim__muon_beta2": 0.95, "optim__muon_decay_by_shape": True},
}


@pytest.fixture
def pools(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def of(model: str, data: Path, run: Path, ranks: int, experts: int | None, stage: int, **options: Any) -> Config:
    sharding = {"parallel__expert_parallel_size": experts, "parallel__zero_stage": stage}
    return tiny_config(model, data, run, ranks=ranks, train__steps=STEPS, **sharding, **options)


@pytest.mark.parametrize(
    ("model", "optimizer", "layouts"),
    [
        # ranks, expert-parallel size, ZeRO stage
        ("looped-moe", "adamw", [(4, 2, 3), (2, 2, 3), (1, 1, 3), (4, 4, 3)]),
        ("mythos", "adamw", [(2, 2, 3), (2, 1, 2), (1, 1, 0), (2, 2, 1), (2, 2, 0), (2, 1, 3)]),
        ("looped-moe", "muon", [(4, 2, 3), (2, 2, 3), (1, 1, 3), (4, 4, 2)]),
        ("newer", "muon", [(2, 2, 1), (1, 1, 0), (2, 1, 2), (2, 2, 3)]),
    ],
)
def test_losses_continue_across_layouts(
    model: str,
    optimizer: str,
    layouts: list[tuple[int, int, int]],
    pools: dict[int, RankPool],
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = OPTIMIZERS[optimizer] | {"eval__every": 6}
    straight = of(model, tiny_data, tmp_path / "straight", *layouts[0], **options)
    assert set(pools[layouts[0][0]].run(run_training, straight)) == {0}
    for number, each in enumerate(layouts):
        config = of(model, tiny_data, tmp_path / "run", *each, **options)
        if number < len(layouts) - 1:
            assert set(pools[each[0]].run(run_some_steps, config, 3)) == {PREEMPTED}
        else:
            assert set(pools[each[0]].run(run_training, config)) == {0}
    for name in TOLERANCE:
        assert curve(config, name) == pytest.approx(curve(straight, name), rel=TOLERANCE[name]), name
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == list(
        range(1, STEPS + 1)
    )
    log = RunDirectory(tmp_path / "run").log(0).read_text(encoding="utf-8")
    assert log.count("was written with another layout (") == len(layouts) - 1


def everything(config: Config, found: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the rank's shards: weights and optimizer state after a load, and the buffers."""
    engine = TrainingEngine(config, torch.device("cpu"))
    if found is not None:
        checkpoint.load(engine, found)
    shards = {}
    for shard in engine.shards():
        state = shard.optimizer_state(shard.start, shard.stop)
        values = {"weights": shard.weights(shard.start, shard.stop)} | state
        shards[shard.name] = (shard.start, shard.stop, shard.steps, {k: v.tolist() for k, v in values.items()})
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in engine.optimizer.param_groups]
    return shards, {"buffers": {k: v.tolist() for k, v in engine.buffers().items()}, "groups": groups}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_number_is_restored_on_another_layout(
    stage: int, optimizer: str, one_rank: RankPool, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    """Weights, moments, step counts, hyperparameters of every group and balance biases, bit for bit."""
    written = of("looped-moe", tiny_data, tmp_path / "run", 2, 2, stage, **OPTIMIZERS[optimizer])
    two_ranks.run(run_some_steps, written, 3)
    found = layout.latest(RunDirectory(tmp_path / "run").checkpoints)
    assert found is not None
    reader = CheckpointReader(found)
    alone = of("looped-moe", tiny_data, tmp_path / "other", 1, 1, (stage + 1) % 4, **OPTIMIZERS[optimizer])
    fresh = one_rank.run(everything, alone, None)[0]
    shards, rest = one_rank.run(everything, alone, found)[0]
    assert rest["groups"] == fresh[1]["groups"], "every group keeps its own hyperparameters"
    assert rest["buffers"] == {name: value.tolist() for name, value in reader.buffers().items()}
    assert any(any(value) for value in rest["buffers"].values()), "the balance biases have moved"
    assert set(shards) == set(reader.manifest.parameters)
    for name, (start, stop, steps, values) in shards.items():
        assert (start, stop) == (0, torch.Size(reader.manifest.parameters[name].shape).numel())
        assert steps == 3
        assert values.pop("weights") == reader.parameter(name).flatten().tolist()
        assert values == {key: value.tolist() for key, value in reader.optimizer_state(name, start, stop).items()}
        assert values, "there is optimizer state"
        assert values["exp_avg"] != [0.0] * stop
        by_muon = optimizer == "muon" and name.endswith(("query.weight", "key_value.weight", "experts.w1"))
        assert not by_muon or 0 < len(values["second_moment"]) < stop / 4


def failure(config: Config, found: Path) -> str:
    try:
        checkpoint.load(TrainingEngine(config, torch.device("cpu")), found)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_of_another_model_is_refused(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    two_ranks.run(run_some_steps, of("looped-moe", tiny_data, tmp_path / "run", 2, 2, 3), 1)
    found = layout.latest(RunDirectory(tmp_path / "run").checkpoints)
    messages = two_ranks.run(failure, of("looped", tiny_data, tmp_path / "other", 2, None, 3), found)
    assert messages[0] == messages[1]
    assert "feed_forward.gate_up.weight is missing, this model's is (96, 32): give the run's own" in messages[0]
