"""The initial weights that the options ask for, and the two constants of the published blocks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mythos.model import build_model
from mythos.model.layers import SquaredReLU
from mythos.model.rules import uniform
from tests.tiny import PUBLISHED_START, VOCABULARY, tiny_config

PATH = Path("unused")
WIDTH, HEAD, HEADS = 32, 16, 2
DEVIATION = math.sqrt(2 / (5 * WIDTH))


def weights(**options: str) -> dict[str, Tensor]:
    return dict(build_model(tiny_config("published", PATH, PATH, **options)).named_parameters())


def assert_orthogonal(matrix: Tensor) -> None:
    """All singular values are equal, and the root mean square of the entries is that of the recipe."""
    singular = torch.linalg.svdvals(matrix)
    assert_close(singular, torch.full_like(singular, DEVIATION * math.sqrt(max(matrix.shape))), rtol=1e-4, atol=1e-5)


def is_orthogonal(matrix: Tensor) -> bool:
    singular = torch.linalg.svdvals(matrix)
    return bool(singular.max() < 1.01 * singular.min())


def test_each_option_changes_only_its_own_parameters() -> None:
    changed_by = {
        "init__token_table": {"embedding.weight"},
        "init__value_tables": {"value_embeddings.tables.1.weight", "value_embeddings.tables.3.weight"},
        "init__value_gates": {"loop.core.0.attention.value_gate.weight", "coda.0.attention.value_gate.weight"},
        "init__key_value": {
            f"{block}.attention.key_value.weight" for block in ("prelude.0", "loop.core.0", "loop.core.1", "coda.0")
        },
    }
    before = weights()
    for option, expected in changed_by.items():
        after = weights(**{option: PUBLISHED_START[option]})
        assert {name for name in before if not torch.equal(before[name], after[name])} == expected


def test_the_published_start() -> None:
    found = weights(**PUBLISHED_START)
    assert found["embedding.weight"].shape == (VOCABULARY, WIDTH)
    assert_orthogonal(found["embedding.weight"])
    table = found["value_embeddings.tables.3.weight"]
    assert table.std().item() == pytest.approx(1, abs=0.05)
    assert table.abs().max() > 2.5, "it is normal"
    for half in found["coda.0.attention.key_value.weight"].chunk(2):
        assert_orthogonal(half)
    gates = found["coda.0.attention.value_gate.weight"]
    assert 0.9 * 32**-0.5 < gates.abs().max() <= 32**-0.5


def test_matrices_in_one_parameter_are_orthogonal_together_by_default() -> None:
    found = weights()
    assert_orthogonal(found["coda.0.attention.key_value.weight"])
    assert not is_orthogonal(found["coda.0.attention.key_value.weight"][: HEADS * HEAD // 2])
    assert not is_orthogonal(found["embedding.weight"])
    assert found["value_embeddings.tables.3.weight"].std().item() == pytest.approx(DEVIATION, rel=0.05)


def test_uniform_numbers_are_those_of_the_normal_distribution_function() -> None:
    drawn = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = uniform(0.5)(drawn)
    assert_close(found, (torch.distributions.Normal(0, 1).cdf(drawn) - 0.5), atol=1e-6, rtol=0)
    assert found.min() > -0.5
    assert found.max() < 0.5
    assert found.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.01)


def test_squared_relu_and_its_factor() -> None:
    layer = SquaredReLU(3, 5, 0.5)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    up, down = layer.up.weight, layer.down.weight
    expected = 0.5 * (x @ up.T).clamp(min=0) ** 2 @ down.T
    assert_close(layer(x), expected)
    inputs = (x, up, down)
    found = torch.autograd.grad(layer(x).sin().sum(), inputs)
    assert_close(found, torch.autograd.grad(expected.sin().sum(), inputs))


def test_the_epsilon_of_the_norm_of_queries_and_keys() -> None:
    """With a large one the queries are small, so that attention is nearly uniform."""
    model = build_model(tiny_config("published", PATH, PATH, model__attention__qk_norm_epsilon=1e-7))
    large = build_model(tiny_config("published", PATH, PATH, model__attention__qk_norm_epsilon=1e6))
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    for each in (model, large):
        torch.nn.init.eye_(each.coda[0].attention.out.weight)
    rotary = model.coda[0].attention.rotary(6, x.device)
    value = torch.zeros(1, 6, HEADS * HEAD)
    sharp, flat = (each.coda[0].attention(x, rotary, value) for each in (model, large))
    v = x @ model.coda[0].attention.key_value.weight[HEADS * HEAD :].T
    means = v.cumsum(dim=1) / torch.arange(1, 7)[:, None]
    assert_close(flat, means, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sharp, means, atol=1e-2)
