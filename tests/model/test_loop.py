"""The loop against slower forms of itself."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mythos.config.schema import Looped
from mythos.model.depth import DepthPlan, plan
from mythos.model.layers import rotary_angles
from mythos.model.loop import Loop
from mythos.model.moe import expert_load
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.masked_loop import masked_loop
from tests.tiny import MODELS, tiny_config

DEPTHS = np.array([1, 6, 3, 2, 4])
ROTARY = rotary_angles(7, 16, 50_000.0, torch.device("cpu"))


def make_loop(kind: str, recompute: bool) -> Loop:
    config = tiny_config(kind, "data", "run").model
    assert isinstance(config, Looped)
    return randomise(Loop(config, recompute), deviation=0.1)


def outcome(loop: Loop, plan_: DepthPlan) -> tuple[torch.Tensor, ...]:
    e = numbers(len(plan_.with_grad), 7, 32)
    h, _ = loop(e, ROTARY, plan_)
    return h, *gradients(h, e, *loop.parameters())


@pytest.mark.parametrize("kind", ["looped", "looped-moe"])
@pytest.mark.parametrize("backprop_depth", [1, 3, 10])
def test_compacted_loop_equals_masked_loop_in_state_and_gradients(kind: str, backprop_depth: int) -> None:
    loop, own = make_loop(kind, True), plan(DEPTHS, backprop_depth, slice(0, 5))
    e = numbers(5, 7, 32)
    masked = masked_loop(loop, e, ROTARY, own)
    expected = masked, *gradients(masked, e, *loop.parameters())
    for value, reference in zip(outcome(loop, own), expected, strict=True):
        assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_each_sequence_goes_through_the_core_as_often_as_planned() -> None:
    loop, own = make_loop("looped", False), plan(DEPTHS, 2, slice(0, 5))
    e = numbers(5, 7, 32)
    together, _ = loop(e, ROTARY, own)
    for row, depth in enumerate(DEPTHS):
        h = torch.zeros(1, 7, 32)
        for _ in range(depth):
            h = loop.step(h, e[row : row + 1], ROTARY)
        assert_close(together[row : row + 1], h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["looped", "looped-moe"])
def test_recomputation_changes_no_bit(kind: str) -> None:
    own = plan(DEPTHS, 3, slice(0, 5))
    kept, recomputed = outcome(make_loop(kind, False), own), outcome(make_loop(kind, True), own)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_gradient_stops_at_the_steps_without_it() -> None:
    loop = make_loop("looped", True)
    e = numbers(1, 7, 32)
    with torch.no_grad():
        detached = torch.zeros(1, 7, 32)
        for _ in range(4):
            detached = loop.step(detached, e, ROTARY)
    h = detached
    for _ in range(2):
        h = loop.step(h, e, ROTARY)
    expected = h, *gradients(h, e, *loop.parameters())
    for value, reference in zip(outcome(loop, plan(np.array([6]), 2, slice(0, 1))), expected, strict=True):
        assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_a_rank_without_sequences_due_takes_all_steps() -> None:
    loop = make_loop("looped-moe", True)
    calls = []
    step = loop.step
    loop.step = lambda h, e, rotary: calls.append(len(h)) or step(h, e, rotary)  # type: ignore[method-assign]
    with torch.no_grad():
        loop(numbers(2, 7, 32), ROTARY, plan(np.array([1, 2, 9, 5]), 3, slice(0, 2)))
    assert calls == [0] * 6 + [0, 1, 2]


def test_load_counts_the_steps_with_gradient_and_no_recomputation() -> None:
    loop, own = make_loop("looped-moe", True), plan(DEPTHS, 2, slice(0, 5))
    loop(numbers(5, 7, 32), ROTARY, own)
    per_layer = sum(own.with_grad) * 7 * MODELS["looped-moe"]["model"]["core_experts"]["experts_per_token"]
    assert expert_load(loop).sum(dim=1).tolist() == [per_layer, per_layer]


def test_diagnostics_describe_the_last_step() -> None:
    loop = make_loop("looped", False)
    e = numbers(2, 7, 32)
    states = [torch.zeros(2, 7, 32)]
    for _ in range(3):
        states.append(loop.step(states[-1], e, ROTARY))
    _, health = loop(e, ROTARY, plan(np.array([3, 3]), 2, slice(0, 2)))
    last, before = states[-1], states[-2]
    assert health["state_norm"].item() == pytest.approx(last.square().sum(dim=-1).mean().sqrt().item(), rel=1e-5)
    assert health["state_change"].item() == pytest.approx(((last - before).norm() / last.norm()).item(), rel=1e-4)
    assert health["spectral_radius"].item() == pytest.approx(loop.injection.decay().max().item())
