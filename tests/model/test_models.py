"""Complete models: initial weights, loss, causality."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mythos.model import build_model, depth, start
from mythos.model.init import initialise
from tests.model.helpers import randomise
from tests.tiny import MODELS, VOCABULARY, tiny_config

PATH = Path("unused")


def forward(kind: str, model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None) -> Any:
    return model(tokens, targets, None if kind == "dense" else depth.fixed(3, len(tokens)))


@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_the_cross_entropy_of_the_logits(kind: str) -> None:
    model = randomise(build_model(tiny_config(kind, PATH, PATH)), deviation=0.1)
    tokens = torch.arange(40).view(2, 20) % VOCABULARY
    logits = forward(kind, model, tokens[:, :-1], None)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    losses = forward(kind, model, tokens[:, :-1], tokens[:, 1:])
    assert_close(losses.cross_entropy, expected.detach())
    penalties = {name: mean for name, mean in losses.measured.items() if name.startswith("train/")}
    weights = {"mythos": ["balance", "router_z", "ponder"], "newer": ["balance"]}
    names = [f"train/{name}_loss" for name in weights.get(kind, [])]
    assert list(penalties) == names, "a penalty without weight is absent"
    assert all(mean.total > 0 for mean in penalties.values())
    assert_close(losses.total, expected + sum(mean.total for mean in penalties.values()))
    losses = forward(kind, model.eval(), tokens[:, :-1], tokens[:, 1:])
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)
    assert_close(losses.by_sequence_B, expected.detach())
    assert_close(losses.total, expected.mean())
    assert not [name for name in losses.measured if name.startswith("train/")]


@pytest.mark.parametrize("kind", MODELS)
def test_an_untrained_model_predicts_uniformly(kind: str) -> None:
    model = build_model(tiny_config(kind, PATH, PATH))
    tokens = torch.randint(VOCABULARY, (8, 30), generator=torch.Generator().manual_seed(0))
    losses = forward(kind, model, tokens[:, :-1], tokens[:, 1:])
    assert losses.cross_entropy.item() == pytest.approx(math.log(VOCABULARY), abs=0.4)


@pytest.mark.parametrize("kind", MODELS)
def test_no_logit_depends_on_a_later_token(kind: str) -> None:
    model = randomise(build_model(tiny_config(kind, PATH, PATH)), deviation=0.1)
    tokens = torch.arange(12).view(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = 90
    before, after = forward(kind, model, tokens, None), forward(kind, model, changed, None)
    assert_close(before[:, :8], after[:, :8], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_initial_weights_depend_only_on_seed_and_name() -> None:
    config = tiny_config("looped-moe", PATH, PATH)
    model, other = build_model(config), build_model(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    initialise(other, start(config), seed=1)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    deviation = math.sqrt(2 / (5 * 32))
    assert model.embedding.weight.std().item() == pytest.approx(deviation, rel=0.05)
    for matrix in (model.prelude[0].attention.query.weight, model.loop.core[0].feed_forward.experts.gate_up_proj[1]):
        assert matrix.square().mean().sqrt().item() == pytest.approx(deviation, rel=1e-5)
        singular = torch.linalg.svdvals(matrix)
        assert_close(
            singular, torch.full_like(singular, deviation * math.sqrt(max(matrix.shape))), rtol=1e-4, atol=1e-5
        )
    assert model.loop.injection.decay().tolist() == pytest.approx([math.sqrt(1 / 5)] * 32)


def test_blocks_start_as_identity() -> None:
    model = build_model(tiny_config("looped-moe", PATH, PATH))
    x = torch.randn(2, 5, 32)
    rotary = (torch.ones(5, 8), torch.zeros(5, 8))
    for block in (*model.prelude, *model.coda):
        assert torch.equal(block(x, rotary), x)
    for block in model.loop.core:
        assert torch.equal(block(x, rotary, None, None, torch.zeros(2, dtype=torch.long), False).x_BSD, x)


def test_the_head_is_the_embedding_table() -> None:
    model = build_model(tiny_config("looped", PATH, PATH))
    assert model.head.weight is model.embedding.weight
