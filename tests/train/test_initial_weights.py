"""The initial weights are the same for every ZeRO stage and number of ranks, and each is made by one rank only."""

from pathlib import Path

import deepspeed
import pytest
import torch

from mythos.config.schema import Config
from mythos.engine import engine
from mythos.model import build_model, draws
from mythos.model.init import Draw
from tests.spawn import RankPool
from tests.tiny import PUBLISHED_START, tiny_config


def weights(config: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every complete parameter of the engine's model, except the routed experts; the names of those drawn here."""
    drawn = []

    def recorded(name: str, draw: Draw) -> Draw:
        return lambda shape, device: (drawn.append(name), draw(shape, device))[1]

    def record_draws(model: torch.nn.Module, config: Config) -> dict[torch.nn.Parameter, Draw]:
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {parameter: recorded(names[parameter], draw) for parameter, draw in draws(model, config).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "draws", record_draws)
        module = engine.TrainingEngine(config, torch.device("cpu")).module
    found = {}
    for name, parameter in module.named_parameters():
        if "experts.w" not in name:  # AutoEP's form, checked by training
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name.replace("router.gate.", "router.")] = parameter.detach().clone()
    return found, drawn


@pytest.mark.parametrize(
    ("model", "stage", "options"), [("mythos", 3, {}), ("mythos", 2, {}), ("published", 3, PUBLISHED_START)]
)
def test_initial_weights_depend_on_neither_stage_nor_ranks(
    model: str,
    stage: int,
    options: dict[str, str],
    one_rank: RankPool,
    two_ranks: RankPool,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    complete = dict(build_model(tiny_config(model, tiny_data, tmp_path, **options)).named_parameters())
    expected = {name: parameter.detach() for name, parameter in complete.items() if "_proj" not in name}
    for pool in (one_rank, two_ranks):
        config = tiny_config(model, tiny_data, tmp_path, ranks=pool.ranks, parallel__zero_stage=stage, **options)
        ranks = pool.run(weights, config)
        for found, _ in ranks:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert sorted(name for _, drawn in ranks for name in drawn) == sorted(complete)
        shares = [sum(complete[name].numel() for name in drawn) for _, drawn in ranks]
        assert min(shares) > 0.6 * max(shares), "the ranks have about the same work"
