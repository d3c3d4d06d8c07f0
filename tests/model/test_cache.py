"""Generation with a cache against the same tokens without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mythos.config.schema import Config
from mythos.eval.forward import exit_rule
from mythos.model import LoopedTransformer, Model, build_model, new_cache
from mythos.model.depth import fixed
from mythos.model.halting import ACTHalting
from mythos.plan.cache import cache_bytes
from tests.model.helpers import randomise
from tests.tiny import LATENT, VOCABULARY, tiny_config

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "model__loop_embeddings": 3,
    "model__adapter_rank": 2,
    "model__adapter_loops": 4,
    "model__halting": {"ponder_weight": 0.01},
}
LENGTHS = (5, 1, 9)
MEAN_DEPTH = 3
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped-query": ("looped", {}),
    "grouped-query, everything": ("looped", EVERYTHING),
    "grouped-query, everything, experts": (
        "looped-moe",
        EVERYTHING | {"model__core_experts__router_bias_per_loop": 3, "model__residual_scaling": "loops"},
    ),
    "value embeddings": ("published", {}),
    "latent": ("looped", {"model__attention": LATENT}),
    "latent, everything, experts": ("mythos", {}),
    "dense model": ("dense", {}),
    "dense model, latent": ("dense", {"model__attention": LATENT}),
}
CASES = [
    (variant, depth)
    for variant, (kind, _) in VARIANTS.items()
    for depth in ((None,) if kind == "dense" else (1, MEAN_DEPTH, 4 * MEAN_DEPTH))
]


def make(kind: str, overrides: dict[str, Any]) -> tuple[Config, Model]:
    config = tiny_config(kind, Path("data"), Path("run"), **overrides)
    model = randomise(build_model(config), deviation=0.15).eval()
    assert isinstance(model, Model)
    return config, model


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def without_cache(model: Model, ids: Tensor, depth: int | None) -> Tensor:
    """The logits after the last token, (V,)."""
    return model(ids[None], None, None if depth is None else fixed(depth, 1, [0]))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "depth"), CASES)
def test_it_gives_the_logits_of_complete_passes(variant: str, depth: int | None) -> None:
    """Prompts of different length, the longest of them in more than one block of the cache."""
    _, model = make(*VARIANTS[variant])
    lengths, new = (*LENGTHS, 66), 6
    ids_BS = tokens(len(lengths), max(lengths) + new)
    cache = new_cache(model, lengths, max(lengths) + new, depth, CPU)
    padded_BS = ids_BS[:, : max(lengths)]
    found = [model(padded_BS, cache=cache)]
    for number in range(new):
        next_B1 = torch.stack([ids_BS[row, length + number] for row, length in enumerate(lengths)])[:, None]
        found.append(model(next_B1, cache=cache))
    for row, length in enumerate(lengths):
        for number, logits_BV in enumerate(found):
            expected = without_cache(model, ids_BS[row, : length + number], depth)
            assert_close(logits_BV[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("variant", "depth"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_the_bytes_of_the_plan(variant: str, depth: int | None, dtype: torch.dtype) -> None:
    config, model = make(*VARIANTS[variant])
    model.product_type = dtype
    cache = new_cache(model, LENGTHS, 70, depth, CPU)
    planned = cache_bytes(config.model, depth or 0, 70, dtype.itemsize)
    assert cache.entries.untyped_storage().nbytes() == len(LENGTHS) * planned
    place = cache.entries.data_ptr()
    with torch.no_grad():
        model(tokens(3, 9), cache=cache)
        model(tokens(3, 1), cache=cache)
    assert (cache.entries.data_ptr(), cache.entries.dtype) == (place, dtype), "allocated once"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["published", "mythos"])
def test_bf16_products_of_a_cache_are_as_close_to_fp32_as_without(kind: str) -> None:
    config = tiny_config(kind, Path("data"), Path("run"), model__width=256)
    model = randomise(build_model(config), deviation=0.05).eval()
    assert isinstance(model, Model)
    ids = tokens(1, 40)
    exact = without_cache(model, ids[0], MEAN_DEPTH)
    model.product_type = torch.bfloat16
    plain, cache = without_cache(model, ids[0], MEAN_DEPTH), new_cache(model, [30], 40, MEAN_DEPTH, CPU)
    model(ids[:, :30], cache=cache)
    for place in range(30, 40):
        cached = model(ids[:, place : place + 1], cache=cache)[0]
    assert 0 < (cached - exact).norm() < 1.5 * (plain - exact).norm() + 0.002 * exact.norm()


@torch.no_grad()
def test_the_noise_of_later_tokens_is_that_of_a_complete_pass() -> None:
    _, model = make("looped", {})
    e, (stream,) = torch.zeros(1, 9, 32), new_cache(model, [1], 9, 1, CPU, state_seed=5).noise
    together = model.loop._initial_state(e, fixed(1, 1, [5])).h_BSD
    parts = [model.loop._noise(e[:, :count], [stream]) for count in (4, 1, 3, 1)]
    assert torch.equal(torch.cat(parts, dim=1), together)


@torch.no_grad()
def test_it_refuses_more_tokens_than_it_has_places_for() -> None:
    _, model = make("looped", {})
    cache = new_cache(model, [3, 5], 6, 2, CPU)
    with pytest.raises(ValueError, match="a cache takes the prompts"):
        model(tokens(2, 3), cache=cache)
    model(tokens(2, 5), cache=cache)
    with pytest.raises(ValueError, match="a cache takes the prompts"):
        model(tokens(2, 2), cache=cache)
    model(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="a cache of 6 tokens cannot take token 7"):
        model(tokens(2, 1), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, LATENT])
def test_a_token_that_has_halted_leaves_the_loop_and_has_the_logits_of_all_steps(attention: Any) -> None:
    """Its prompt has taken all steps, so that nothing of them is copied yet."""
    options = EVERYTHING if attention is None else EVERYTHING | {"model__attention": attention}
    config, model = make("looped-moe", options | {"eval__exit_when_halted": True})
    assert isinstance(model, LoopedTransformer)
    assert isinstance(model.loop.halting, ACTHalting)
    model.loop.halting.gate.bias.fill_(-2.0)  # tokens halt at different steps
    ids_BS = tokens(4, 9)
    depth, rule = 4 * MEAN_DEPTH, exit_rule(config.eval)
    assert rule is not None
    cache = new_cache(model, [8] * 4, 9, depth, CPU)
    model(ids_BS[:, :8], None, None, rule, cache=cache)
    found = model(ids_BS[:, 8:], None, None, rule, cache=cache)
    for row, logits_V in enumerate(found):
        assert_close(logits_V, without_cache(model, ids_BS[row], depth), atol=1e-5, rtol=0)
    assert len(cache.loop_steps_B.unique()) > 1, cache.loop_steps_B


class Leaves:
    """Sequence b leaves the loop after ``steps[b]`` steps; the rule is asked about the sequences that are left."""

    def __init__(self, steps: list[int]) -> None:
        self.left, self.done = steps, 0

    def __call__(self, before: Tensor, after: Tensor, halted: Tensor | None) -> Tensor:
        self.done += 1
        assert len(after) == len(self.left)
        leaves = [steps == self.done for steps in self.left]
        self.left = [steps for steps in self.left if steps != self.done]
        return torch.tensor(leaves)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["looped-moe", "mythos"])
def test_each_sequence_leaves_the_loop_by_itself(kind: str) -> None:
    """Against one sequence at a time at that depth, whose entries of the other steps are filled in by hand."""
    _, model = make(kind, {})
    depth, leaves, length = 6, [2, 6, 4], 5
    ids_BS = tokens(3, length + 3)
    cache = new_cache(model, [length] * 3, length + 3, depth, CPU)
    model(ids_BS[:, :length], None, None, Leaves(leaves), cache=cache)
    assert cache.loop_steps_B.tolist() == [depth] * 3, "prompts take all steps"
    first = model(ids_BS[:, length : length + 1], None, None, Leaves(leaves), cache=cache)
    assert cache.loop_steps_B.tolist() == leaves
    later = [model(ids_BS[:, place : place + 1], cache=cache) for place in (length + 1, length + 2)]
    for row, steps in enumerate(leaves):
        ids_1S = ids_BS[row : row + 1]
        shallow, whole = (new_cache(model, [length], length + 3, each, CPU) for each in (steps, depth))
        for each in (shallow, whole):
            model(ids_1S[:, :length], cache=each)
        coda = len(model.coda)
        shallow.entries[-coda:, :, :length] = whole.entries[-coda:, :, :length]  # the prompt has taken all steps
        alone = model(ids_1S[:, length : length + 1], cache=shallow)[0]
        assert_close(first[row], alone, atol=1e-5, rtol=1e-5)
        model(ids_1S[:, length : length + 1], cache=whole)
        begin, layers = whole.prelude_slots, whole.core_slots
        copied = [begin + min(step, steps - 1) * layers + layer for step in range(depth) for layer in range(layers)]
        slots = [*range(begin), *copied, *range(begin + steps * layers, len(shallow.entries))]
        whole.entries[:, :, length] = shallow.entries[slots][:, :, length]
        for place, found in zip((length + 1, length + 2), later, strict=True):
            expected = model(ids_1S[:, place : place + 1], cache=whole)[0]
            assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
