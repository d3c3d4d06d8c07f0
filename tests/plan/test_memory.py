"""Memory: activations against the tensors that autograd keeps; ZeRO's parts against what the ranks hold."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model import build_model
from mythos.model.depth import fixed
from mythos.plan.activations import kept_bytes
from mythos.plan.layout import layout_of
from mythos.plan.memory import checkpoint_bytes, memory, snapshot_bytes
from mythos.plan.precision import FP32
from tests.experts import experts_as_on_a_gpu
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config

SEQUENCES, LENGTH, DEPTH = 4, 128, 3


def kept(model: Any, parameters: Any) -> int:
    """Bytes of all tensors that the forward pass keeps for the backward pass, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address occurs twice
        return tensor

    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    depths = fixed(DEPTH, SEQUENCES)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(tokens, tokens, depths)
    assert losses.total.requires_grad
    return sum(size for size, _ in storages.values())


def kept_by_engine(config: Config, as_on_a_gpu: bool) -> int:
    with experts_as_on_a_gpu() if as_on_a_gpu else nullcontext():
        engine = TrainingEngine(config, torch.device("cpu"))
    return kept(engine, engine.module.parameters())


def config_of(kind: str, tmp_path: Path, **overrides: Any) -> Config:
    loop = {} if kind == "dense" else {"loop__mean_depth": DEPTH, "loop__depth": "fixed", "loop__backprop_depth": DEPTH}
    sizes = {"train__micro_batch_sequences": SEQUENCES, "data__sequence_length": LENGTH}
    return tiny_config(kind, tmp_path, tmp_path, **(loop | sizes | overrides))


def of_head(config: Config) -> int:
    """The gradients that the loss computes in the forward pass: the plan counts them with the logits."""
    width = config.model.width
    return 4 * width * (config.model.vocabulary_size + SEQUENCES * LENGTH)


@pytest.mark.parametrize("kind", ["dense", "looped", "published"])
def test_activations_are_what_autograd_keeps(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, tmp_path, **({} if kind == "dense" else {"loop__recompute": False}))
    model = build_model(config).train()
    call = model if config.loop else lambda tokens, targets, depths: model(tokens, targets)
    measured = kept(call, model.parameters()) - of_head(config)
    assert kept_bytes(config, FP32, recompute=False) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_activations_of_experts_are_what_autograd_keeps(as_on_a_gpu: bool, two_ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(
        "looped-moe", tmp_path, ranks=2, parallel__zero_stage=2, loop__recompute=False, parallel__expert_parallel_size=1
    )
    measured = two_ranks.run(kept_by_engine, config, as_on_a_gpu)[0] - of_head(config)
    assert kept_bytes(config, FP32, recompute=False) == pytest.approx(measured, rel=0.05)


def test_recomputation_keeps_one_step_and_the_states(tmp_path: Path) -> None:
    config = config_of("looped", tmp_path)
    every_step = kept_bytes(config, FP32, recompute=False)
    step = every_step - kept_bytes(config_of("looped", tmp_path, loop__mean_depth=2), FP32, recompute=False)
    state = SEQUENCES * LENGTH * config.model.width * 4
    assert kept_bytes(config, FP32, recompute=True) == pytest.approx(every_step - 2 * step + 3 * state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_parts_of_a_rank_are_those_of_zero(optimizer: str, tmp_path: Path) -> None:
    """Closed forms for a dense model of P parameters on N ranks (arXiv 1910.02054), in fp32."""
    ranks = 4
    found = {}
    for stage in range(4):
        config = tiny_config(
            "dense",
            tmp_path,
            tmp_path,
            ranks=ranks,
            parallel__zero_stage=stage,
            optim__kind=optimizer,
            train__micro_batch_sequences=2,
        )
        layout = layout_of(config, ranks, ranks)
        found[stage] = memory(config, layout, FP32, on_gpu=False, recompute=False)
    count = sum(parameter.numel() for parameter in build_model(config).parameters())
    matrices = sum(p.numel() for n, p in build_model(config).named_parameters() if "blocks" in n and p.ndim > 1)
    moments = 2 * count if optimizer == "adamw" else 2 * count - matrices
    assert [found[stage].weights for stage in range(4)] == pytest.approx([4 * count] * 3 + [count])
    assert [found[stage].gradients for stage in range(4)] == pytest.approx([4 * count, 4 * count, count, count])
    assert found[0].optimizer == 4 * moments
    assert found[2].optimizer == pytest.approx((4 * moments + FP32.weights * count) / ranks)
    assert checkpoint_bytes(config) == 4 * (count + moments)
    assert snapshot_bytes(config, layout) == pytest.approx(checkpoint_bytes(config) / ranks)
