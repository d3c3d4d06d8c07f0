"""The experts of one rank on a CPU: AutoEP's own form of the layer gives the same output and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.engine.experts import LocalExperts
from mythos.model.moe import moe_layers
from mythos.model.precision import products_in
from tests.model.helpers import gradients, numbers, randomise
from tests.spawn import RankPool
from tests.tiny import tiny_config

TOKENS = (0, 1, 300)


def class_of_the_layer(config: Config) -> str:
    return type(moe_layers(TrainingEngine(config, torch.device("cpu")).module)[0]).__name__


def outcomes(config: Config, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Output, load and gradients of both forms, for numbers of tokens; half of the rounds choose few experts."""
    layer: Any = moe_layers(TrainingEngine(config, torch.device("cpu")).module)[0]
    assert type(layer) is LocalExperts
    randomise(layer)
    found = []
    for few in (0.0, 100.0):
        layer.router.e_score_correction_bias[: layer.top_k] = few
        for tokens in TOKENS:
            x = numbers(1, tokens, config.model.width).to(dtype)
            both = []
            for form in (LocalExperts, AutoEPMoELayer):
                layer.__class__ = form
                layer.tokens_per_expert.zero_()
                with products_in(dtype, x.device):
                    output = layer(x)
                both.append([output, layer.tokens_per_expert.clone(), *gradients(output, x, *layer.parameters())])
            found.append((both[0], both[1]))
    return [([each.detach() for each in own], [each.detach() for each in other]) for own, other in found]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_both_forms_agree(dtype: torch.dtype, tolerance: float, one_rank: RankPool, tmp_path: Path) -> None:
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = tiny_config("looped-moe", tmp_path, tmp_path, precision=precision, parallel__zero_stage=2)
    (found,) = one_rank.run(outcomes, config, dtype)
    assert len(found) == 2 * len(TOKENS)
    for own, autoep in found:
        for ours, theirs in zip(own, autoep, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()


def test_experts_that_are_spread_over_ranks_keep_the_exchange(two_ranks: RankPool, tmp_path: Path) -> None:
    for size, name in ((1, "LocalExperts"), (2, "AutoEPMoELayer")):
        config = tiny_config("looped-moe", tmp_path, tmp_path, ranks=2, parallel__expert_parallel_size=size)
        assert two_ranks.run(class_of_the_layer, config) == [name] * 2
