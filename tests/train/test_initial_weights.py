"""A model that is built sharded by ZeRO-3 has the same initial weights as one that is built complete."""

from pathlib import Path

import deepspeed
import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model import build_model
from tests.spawn import RankPool
from tests.tiny import PUBLISHED_START, tiny_config


def weights(config: Config) -> dict[str, torch.Tensor]:
    """Every complete parameter of the engine's model, except the routed experts."""
    engine = TrainingEngine(config, torch.device("cpu"))
    found = {}
    for name, parameter in engine.module.named_parameters():
        if "experts.w" not in name:  # AutoEP's form, checked by training
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name.replace("router.gate.", "router.")] = parameter.detach().clone()
    return found


@pytest.mark.parametrize(("model", "options"), [("mythos", {}), ("published", {}), ("published", PUBLISHED_START)])
def test_sharded_and_complete_models_have_the_same_initial_weights(
    model: str, options: dict[str, str], one_rank: RankPool, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    expected = {
        name: parameter.detach()
        for name, parameter in build_model(tiny_config(model, tiny_data, tmp_path, **options)).named_parameters()
        if "_proj" not in name
    }
    for pool in (one_rank, two_ranks):
        for found in pool.run(weights, tiny_config(model, tiny_data, tmp_path, ranks=pool.ranks, **options)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
