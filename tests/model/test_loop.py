"""The loop against slower implementations of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mythos.config.model_schema import Looped
from mythos.model import build_model
from mythos.model.depth import DepthPlan, fixed, plan
from mythos.model.layers import rotary_angles
from mythos.model.loop import Loop, LoopInputs
from mythos.model.moe import expert_load
from mythos.model.rules import initial_deviation
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.masked_loop import masked_loop
from tests.reference.newer_core import newer_core
from tests.tiny import MODELS, VOCABULARY, tiny_config

DEPTHS = np.array([1, 6, 3, 2, 4])
ROTARY = rotary_angles(7, 16, 50_000.0, torch.device("cpu"))
EVERYTHING: dict[str, Any] = {
    "model__loop_embeddings": 3,
    "model__adapter_rank": 2,
    "model__adapter_loops": 4,
    "model__halting": {"ponder_weight": 0.01},
    "model__attention__value_embeddings": True,
}
ROUTED: dict[str, Any] = {"model__core_experts__balance_loss": 0.1, "model__core_experts__router_z_loss": 0.05}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense core": ("looped", {}),
    "experts": ("looped-moe", {}),
    "dense core, everything": ("looped", EVERYTHING),
    "experts, everything": ("looped-moe", EVERYTHING | ROUTED),
    "newer options": ("newer", {}),
    "linear injection": ("looped", {"model__injection": "linear"}),
    "additive injection": ("looped", {"model__injection": "additive", "model__initial_state": "zero"}),
}


def make_loop(variant: str, recompute: bool = True) -> Loop:
    kind, overrides = VARIANTS[variant]
    config = tiny_config(kind, "data", "run", loop__recompute=recompute, **overrides)
    assert isinstance(config.model, Looped)
    assert config.loop is not None
    return randomise(Loop(config.model, config.loop), deviation=0.1)


def make_plan(backprop_depth: int) -> DepthPlan:
    return plan(DEPTHS, backprop_depth, slice(0, 5), range(10, 15))


def make_inputs(loop: Loop, sequences: int) -> tuple[Tensor, list[Tensor | None]]:
    with_gate = [getattr(block.attention, "value_gate", None) is not None for block in loop.core]
    values = [numbers(sequences, 7, 16, seed=5 + i) if gate else None for i, gate in enumerate(with_gate)]
    return numbers(sequences, 7, 32), values


def leaves(loop: Loop, e: Tensor, values: list[Tensor | None]) -> list[Tensor]:
    return [e, *(value for value in values if value is not None), *loop.parameters()]


def outcome(loop: Loop, own: DepthPlan) -> list[Tensor]:
    """Output, penalties, and the gradients of both for every input and parameter."""
    e, values = make_inputs(loop, len(own.with_grad))
    output, penalties, _ = loop(e, values, ROTARY, own)
    together = torch.cat((output.flatten(), penalties * 10))
    return [output, penalties, *gradients(together, *leaves(loop, e, values))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backprop_depth", [1, 3, 10])
def test_compacted_loop_equals_masked_loop_in_state_and_gradients(variant: str, backprop_depth: int) -> None:
    loop, own = make_loop(variant), make_plan(backprop_depth)
    e, values = make_inputs(loop, 5)
    state = masked_loop(loop, LoopInputs(e, values, ROTARY), own)
    output = state.h_BSD if state.halting is None else state.halting.output_BSD
    steps = torch.tensor(own.with_grad)
    balance, router_z = ((penalty_B / steps).mean() / len(loop.core) for penalty_B in state.penalties_BP.unbind(1))
    ponder = torch.zeros(()) if state.halting is None else 0.01 * state.halting.ponder_BS.mean()
    penalties = torch.stack((balance, router_z, ponder))
    together = torch.cat((output.flatten(), penalties * 10))
    expected = [output, penalties, *gradients(together, *leaves(loop, e, values))]
    for value, reference in zip(outcome(loop, own), expected, strict=True):
        assert_close(value, reference, rtol=1e-4, atol=2e-5)


def test_each_sequence_goes_through_the_core_as_often_as_planned() -> None:
    loop, own = make_loop("dense core, everything", recompute=False), make_plan(2)
    e, values = make_inputs(loop, 5)
    together, _, _ = loop(e, values, ROTARY, own)
    for row, place in enumerate(own.order):
        alone = [None if value is None else value[row : row + 1] for value in values]
        single, _, _ = loop(e[row : row + 1], alone, ROTARY, fixed(int(DEPTHS[place]), 1, [10 + place]))
        assert_close(together[row : row + 1], single, rtol=1e-5, atol=1e-6)


def test_results_are_in_the_order_of_the_caller() -> None:
    model = build_model(tiny_config("published", "data", "run"))
    randomise(model, deviation=0.1)
    tokens = torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(3))
    own = make_plan(2)
    logits = model(tokens, None, own)
    with torch.no_grad():
        losses = model.eval()(tokens[:, :-1], tokens[:, 1:], own)
    for place, depth in enumerate(DEPTHS):
        alone = fixed(int(depth), 1, [10 + place])
        row = tokens[place : place + 1]
        assert_close(logits[place : place + 1], model(row, None, alone), rtol=1e-5, atol=1e-5)
        assert_close(losses.by_sequence_B[place], model(row[:, :-1], row[:, 1:], alone).by_sequence_B[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_changes_no_bit(variant: str) -> None:
    own = make_plan(3)
    kept, recomputed = outcome(make_loop(variant, False), own), outcome(make_loop(variant, True), own)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_full_backpropagation_equals_an_unrolled_stack_with_tied_weights() -> None:
    loop = make_loop("dense core", recompute=True)
    own = plan(np.array([4]), 4, slice(0, 1), [3])
    e, values = make_inputs(loop, 1)
    start = loop._initial_state(e, own).h_BSD
    copies = [make_loop("dense core", recompute=False) for _ in range(4)]
    h = start
    for copy in copies:
        h = copy.injection(h, e)
        for block in copy.core:
            h = h + block.attention(block.attention_norm(h), ROTARY, None)
            h = h + block.feed_forward(block.feed_forward_norm(h))
    by_copy = gradients(h, e, *(parameter for copy in copies for parameter in copy.parameters()))
    size = len(list(loop.parameters()))
    tied = [sum(by_copy[1 + i + size * step] for step in range(4)) for i in range(size)]
    output, _, _ = loop(e, values, ROTARY, own)
    assert_close(output, h, rtol=1e-5, atol=1e-6)
    for own_gradient, expected in zip(gradients(output, e, *loop.parameters()), [by_copy[0], *tied], strict=True):
        assert_close(own_gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 4])
def test_the_core_with_newer_options_and_its_gradients_equal_their_equations(depth: int) -> None:
    """In steps 3 and 4 the last of two router biases; the mean depth, by which layers are scaled, is 3."""
    loop, own = make_loop("newer options"), plan(np.array([depth]), 4, slice(0, 1), [3])
    randomise(loop, deviation=0.4)
    e, values = make_inputs(loop, 1)
    start = loop._initial_state(e, own).h_BSD[0]
    output, _, _ = loop(e, values, ROTARY, own)
    expected = newer_core(loop, start, e[0], ROTARY, depth)[None]
    assert_close(output, expected, rtol=1e-4, atol=1e-5)
    inputs = (e, *loop.parameters())
    for fast, slow in zip(gradients(output, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(fast, slow, rtol=1e-3, atol=1e-4)


def test_gradient_stops_at_the_steps_without_it() -> None:
    loop = make_loop("dense core")
    own = plan(np.array([6]), 2, slice(0, 1), [3])
    e, values = make_inputs(loop, 1)
    state, inputs = loop._initial_state(e, own), LoopInputs(e, values, ROTARY)
    for _ in range(4):
        state = loop.step(state, inputs, False, False)
    state = replace(state, h_BSD=state.h_BSD.detach())
    for _ in range(2):
        state = loop.step(state, inputs, False, False)
    output, _, _ = loop(e, values, ROTARY, own)
    assert_close(output, state.h_BSD, rtol=1e-5, atol=1e-6)
    expected = gradients(state.h_BSD, e, *loop.parameters())
    for value, reference in zip(gradients(output, e, *loop.parameters()), expected, strict=True):
        assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_a_rank_without_sequences_due_makes_all_steps_and_computes_nothing_else() -> None:
    loop = make_loop("experts, everything")
    calls = []
    step = loop.step
    loop.step = lambda state, *rest: calls.append(len(state.h_BSD)) or step(state, *rest)  # type: ignore[method-assign]
    with torch.no_grad():
        loop(*make_inputs(loop, 2), ROTARY, plan(np.array([1, 2, 9, 5]), 3, slice(0, 2), [0, 1]))
    assert calls == [0] * 6 + [0, 1, 2]
    assert sum(calls) == 1 + 2, "only the sequences that are due are computed"


def test_a_core_without_experts_skips_the_steps_that_no_sequence_needs() -> None:
    loop = make_loop("dense core, everything")
    calls = []
    step = loop.step
    loop.step = lambda state, *rest: calls.append(len(state)) or step(state, *rest)  # type: ignore[method-assign]
    with torch.no_grad():
        loop(*make_inputs(loop, 2), ROTARY, plan(np.array([1, 2, 9, 5]), 3, slice(0, 2), [0, 1]))
    assert calls == [1, 2]


def test_load_counts_the_steps_with_gradient_and_no_recomputation() -> None:
    loop, own = make_loop("experts"), make_plan(2)
    loop(*make_inputs(loop, 5), ROTARY, own)
    per_layer = sum(own.with_grad) * 7 * MODELS["looped-moe"]["model"]["core_experts"]["experts_per_token"]
    assert expert_load(loop).sum(dim=1).tolist() == [per_layer, per_layer]


def test_diagnostics_describe_the_last_step() -> None:
    loop = make_loop("experts", recompute=False)
    own = plan(np.array([3, 3]), 2, slice(0, 2), [0, 1])
    e, values = make_inputs(loop, 2)
    states, inputs = [loop._initial_state(e, own)], LoopInputs(e, values, ROTARY)
    for _ in range(3):
        states.append(loop.step(states[-1], inputs, False, True))
    _, _, health = loop(e, values, ROTARY, own)
    last, before = states[-1], states[-2]
    h, h_before = last.h_BSD, before.h_BSD
    assert health["loop/state_norm"].total.item() == pytest.approx(
        h.square().sum(dim=-1).mean().sqrt().item(), rel=1e-5
    )
    assert health["loop/state_change"].total.item() == pytest.approx(
        ((h - h_before).norm() / h.norm()).item(), rel=1e-4
    )
    assert health["loop/spectral_radius"].total.item() == pytest.approx(loop.injection.decay().max().item())
    entropies, changes = [], []
    for layer in range(2):
        now, then = last.routing[layer], before.routing[layer]
        shares = now.scores_BSE / now.scores_BSE.sum(dim=-1, keepdim=True)
        entropies.append(torch.distributions.Categorical(probs=shares).entropy().mean().item())
        changes.append((now.chosen_BSE != then.chosen_BSE).any(dim=-1).float().mean().item())
    assert health["moe/router_entropy"].total.item() == pytest.approx(sum(entropies) / 2, rel=1e-5)
    changed = health["moe/choice_changed"]
    assert changed.total.item() / changed.weight == pytest.approx(sum(changes) / 2)


@pytest.mark.parametrize(("depths", "backprop_depth", "compared"), [([3, 4], 1, 0), ([1, 1], 2, 0), ([1, 3], 2, 1)])
def test_a_change_of_choice_is_measured_only_where_there_are_two_steps_with_gradient(
    depths: list[int], backprop_depth: int, compared: int
) -> None:
    own = plan(np.array(depths), backprop_depth, slice(0, 2), [0, 1])
    loop = make_loop("experts", recompute=False)
    _, _, health = loop(*make_inputs(loop, 2), ROTARY, own)
    assert health["moe/choice_changed"].weight == compared * 7 * len(loop.core)


def test_the_router_is_not_evaluated_again_for_a_penalty_without_gradient() -> None:
    loop, own = make_loop("experts, everything", recompute=False), make_plan(2)
    calls: dict[bool, list[int]] = {True: [], False: []}
    for block in loop.core:
        block.feed_forward.router.register_forward_hook(
            lambda module, inputs, output: calls[torch.is_grad_enabled()].append(output[..., 0].numel())
        )
    loop(*make_inputs(loop, 5), ROTARY, own)
    tokens = 7 * len(loop.core)
    assert sum(calls[False]) == sum(own.without_grad) * tokens, "once, for the experts"
    assert sum(calls[True]) == 2 * sum(own.with_grad) * tokens, "and once more for the penalties"


@pytest.mark.parametrize("backprop_depth", [1, 3])
def test_the_same_outputs_have_a_gradient_whatever_the_depth(backprop_depth: int) -> None:
    loop = make_loop("dense core, everything")
    output, penalties, _ = loop(*make_inputs(loop, 5), ROTARY, make_plan(backprop_depth))
    assert output.requires_grad
    assert penalties.requires_grad, "ZeRO-3 counts the hooks of these outputs, on every rank alike"


def test_the_first_state_is_truncated_noise_from_the_sequences_own_seed() -> None:
    loop = make_loop("dense core")
    loop.noise_deviation = initial_deviation(32)
    e = torch.zeros(64, 200, 32)
    noise = loop._initial_state(e, fixed(1, 64, range(5, 69))).h_BSD
    assert noise.abs().max() <= 3 * loop.noise_deviation
    # standard deviation of a normal cut at 3: sqrt(1 - 6 phi(3) / (2 Phi(3) - 1)) = 0.98658
    assert noise.std().item() == pytest.approx(0.98658 * loop.noise_deviation, rel=0.01)
    again = loop._initial_state(e[:3], fixed(1, 3, range(7, 10))).h_BSD
    assert torch.equal(again, noise[2:5]), "it depends only on the sequence's seed"


def test_an_exit_rule_ends_the_loop() -> None:
    loop = make_loop("dense core")
    e, values = make_inputs(loop, 2)
    seen = []

    def after_three(before: Tensor, after: Tensor, halted: Tensor | None) -> Tensor:
        seen.append((after - before).norm().item())
        return torch.tensor([len(seen) in (1, 3), len(seen) >= 2])  # at step 3 both sequences need no more

    with torch.no_grad():
        early, _, _ = loop(e, values, ROTARY, fixed(9, 2), after_three)
        three, _, _ = loop(e, values, ROTARY, fixed(3, 2))
    assert len(seen) == 3
    assert torch.equal(early, three)
