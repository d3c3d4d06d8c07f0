"""Experts on a CPU, on one rank and spread over two: AutoEP's own form of the layer gives the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.engine.experts import CPUExperts, CPULayer
from mythos.model.moe import moe_layers
from mythos.model.precision import products_in
from tests.model.helpers import gradients, numbers, randomise
from tests.spawn import RankPool
from tests.tiny import tiny_config

TOKENS = (0, 1, 300)


def outcomes(config: Config, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Output, load and gradients of both forms; half of the rounds choose few experts. Ranks have other tokens."""
    layer: Any = moe_layers(TrainingEngine(config, torch.device("cpu")).module)[0]
    assert type(layer) is CPULayer
    assert layer.ep_size == dist.get_world_size()
    randomise(layer, seed=dist.get_rank())
    found = []
    for few in (0.0, 100.0):
        layer.router.e_score_correction_bias[: layer.top_k] = few
        for tokens in TOKENS[:: -1 if dist.get_rank() else 1]:
            x = numbers(1, tokens, config.model.width, seed=dist.get_rank()).to(dtype)
            both = []
            for form in ((CPULayer, CPUExperts), (AutoEPMoELayer, GroupedExperts)):
                layer.__class__, layer.experts.__class__ = form
                layer.tokens_per_expert.zero_()
                with products_in(dtype, x.device):
                    output = layer(x)
                numbers_of_form = [output, layer.tokens_per_expert.clone(), *gradients(output, x, *layer.parameters())]
                both.append([each.detach() for each in numbers_of_form])
            found.append((both[0], both[1]))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_forms_agree(
    ranks: int, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool: RankPool = request.getfixturevalue("two_ranks" if ranks == 2 else "one_rank")
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = tiny_config("looped-moe", tmp_path, tmp_path, ranks=ranks, precision=precision, parallel__zero_stage=2)
    found = [outcome for of_rank in pool.run(outcomes, config, dtype) for outcome in of_rank]
    assert len(found) == 2 * len(TOKENS) * ranks
    for own, autoep in found:
        for ours, theirs in zip(own, autoep, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()
