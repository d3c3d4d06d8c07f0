"""The loss before the first step of every shipped model, at full width, against the formula in docs/recipes.md.

The blocks start as the identity (tests/model/test_models.py), so two of them are enough, and what is inside them is
made small, like the vocabulary. The models of the ladder above 2,048 channels differ from the smallest in sizes only.
"""

import math
from dataclasses import replace

import pytest
import torch

from mythos.config.load import load
from mythos.config.model_schema import Dense, GroupedQuery, Looped
from mythos.config.schema import Config
from mythos.model import build_model
from tests.cluster import REPO

CONFIGS = REPO / "configs"
VOCABULARY, TOKENS = 4096, 256


def small_inside(model: Looped | Dense) -> Looped | Dense:
    """Two layers (a looped model: one in the prelude and one in the core, and one in the coda)."""
    few = {"heads": 1, "kv_heads": 1} if isinstance(model.attention, GroupedQuery) else {"heads": 1}
    model = replace(
        model,
        vocabulary_size=VOCABULARY,
        attention=replace(model.attention, **few),
        feed_forward=replace(model.feed_forward, hidden_size=32),
    )
    if isinstance(model, Dense):
        return replace(model, layers=2)
    experts = model.core_experts and replace(model.core_experts, expert_hidden_size=8, shared_hidden_size=8)
    return replace(model, prelude_layers=1, core_layers=1, coda_layers=1, core_experts=experts)


def shipped() -> list[str]:
    files = sorted((CONFIGS / "model").glob("*.yaml"))
    widths = {path.stem: load([path, CONFIGS / "run" / "demo.yaml"]).model.width for path in files}
    return [name for name, width in widths.items() if width <= 2048]


def published_formula(config: Config) -> float:
    """A looped model: logits of deviation s sqrt(D). A standard one: also s D at the input token."""
    width = config.model.width
    deviation = math.sqrt(2 / (5 * width))
    scale = 1 / math.sqrt(1 + config.model.norm_epsilon / deviation**2)
    others = math.log(VOCABULARY) + (scale * deviation) ** 2 * width / 2
    own = scale * deviation * width if isinstance(config.model, Dense) else -math.inf
    return math.log(math.exp(own) + math.exp(others))


@pytest.mark.parametrize("name", shipped())
def test_the_loss_at_the_first_step(name: str) -> None:
    """With the recipe of Mythos, and with the norm before the head as published."""
    model, recipe, run = (CONFIGS / path for path in (f"model/{name}.yaml", "recipe/mythos.yaml", "run/demo.yaml"))
    config = load([model, recipe, run])
    module = build_model(replace(config, model=small_inside(config.model))).eval()
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = module(tokens[:, :-1], tokens[:, 1:]).total.item()
        module.head.norm.weight.fill_(1)
        published = module(tokens[:, :-1], tokens[:, 1:]).total.item()
    assert loss == pytest.approx(math.log(VOCABULARY), abs=0.1)
    formula = published_formula(config)
    assert published == pytest.approx(formula, abs=0.25)
    if name == "transformer-1.3b":
        assert formula == pytest.approx(24.3, abs=0.1)
    if name == "looped-1.3b":
        assert formula == pytest.approx(math.log(VOCABULARY) + 0.2, abs=0.02)
