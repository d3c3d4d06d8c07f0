"""Adaptive computation time against Graves' definition, token by token."""

import pytest
import torch
from torch.testing import assert_close

from mythos.config.model_schema import Halting
from mythos.model import build_model
from mythos.model.depth import fixed
from mythos.model.halting import ACTHalting, HaltingState
from mythos.model.loop import Loop
from tests.model.helpers import gradients, numbers, randomise
from tests.tiny import VOCABULARY, tiny_config

STEPS = 6


def halting(bias: float, threshold: float = 0.9) -> ACTHalting:
    module = randomise(ACTHalting(4, Halting(threshold=threshold)), deviation=0.5)
    with torch.no_grad():
        module.gate.bias.fill_(bias)
    return module


def weigh(module: ACTHalting, states: list[torch.Tensor]) -> HaltingState:
    halting = module.start(states[0])
    for number, h in enumerate(states):
        halting = module(h, halting, last=number == len(states) - 1)
    return halting


@pytest.mark.parametrize("bias", [-4.0, -1.0, 0.0, 3.0])
def test_output_and_ponder_cost_follow_graves(bias: float) -> None:
    module, states = halting(bias), [numbers(2, 3, 4, seed=s) for s in range(STEPS)]
    output, total, ponder = weigh(module, states)
    assert torch.equal(total, torch.ones(2, 3))
    expected_output, expected_ponder = [], []
    for row in range(2):
        for position in range(3):
            spent, result, cost = torch.zeros(()), torch.zeros(4), torch.zeros(())
            for number, h in enumerate(states):
                probability = torch.sigmoid(module.gate(h[row, position]))[0]
                cost = cost + 1
                if spent + probability >= 0.9 or number == STEPS - 1:
                    result, cost = result + (1 - spent) * h[row, position], cost + (1 - spent)
                    break
                result, spent = result + probability * h[row, position], spent + probability
            expected_output.append(result)
            expected_ponder.append(cost)
    expected = torch.stack(expected_output).view(2, 3, 4)
    assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert_close(ponder, torch.stack(expected_ponder).view(2, 3))
    inputs = (*states, *module.parameters())
    used = [
        i for i in inputs if torch.autograd.grad(output.sum(), i, retain_graph=True, allow_unused=True)[0] is not None
    ]
    for own, reference in zip(
        torch.autograd.grad(output.sum() + ponder.sum(), used, allow_unused=True),
        torch.autograd.grad(
            expected.sum() + torch.stack(expected_ponder).sum(), used, allow_unused=True, materialize_grads=True
        ),
        strict=True,
    ):
        assert_close(own, reference, rtol=1e-4, atol=1e-5)


def test_the_weights_of_every_token_sum_to_one() -> None:
    module = halting(-1.5)
    ones = [torch.ones(5, 7, 4) for _ in range(STEPS)]
    output, total, _ = weigh(module, ones)
    assert torch.equal(total, torch.ones(5, 7))
    assert_close(output, torch.ones(5, 7, 4), rtol=0, atol=2e-7)


def test_states_in_bf16_are_weighed_and_added_in_fp32() -> None:
    module, steps = halting(-4.0), 50
    states = [numbers(2, 3, 4, seed=s).bfloat16() for s in range(steps)]
    with torch.no_grad():
        exact = weigh(module, [h.float() for h in states])
        found = weigh(module.bfloat16(), states)
    weights = found.weight_BS
    assert_close(found.output_BSD, exact.output_BSD, rtol=0, atol=0.01)
    assert found.output_BSD.dtype == torch.float32
    assert found.weighted_mean(states[-1]).dtype == torch.bfloat16
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize("mean_depth", [2, 4, 8])
def test_tokens_start_by_halting_at_the_trained_depth(mean_depth: int) -> None:
    config = tiny_config("looped", "d", "r", model__halting={}, loop__mean_depth=mean_depth)
    model = build_model(config).eval()
    tokens = torch.arange(12).view(1, 12)
    ponder = model(tokens, tokens, fixed(4 * mean_depth, 1)).measured["loop/ponder"]
    assert ponder.total.item() == pytest.approx(mean_depth, abs=1.01), "steps taken plus a remainder below 1"


def test_evaluation_may_leave_the_loop_when_every_token_has_halted() -> None:
    config = tiny_config("looped", "d", "r", model__halting={}, loop__recompute=False)
    loop = Loop(config.model, config.loop)
    randomise(loop, deviation=0.1)
    with torch.no_grad():
        loop.halting.gate.bias.fill_(0.0)
    e, rotary, seen = numbers(2, 5, 32), (torch.ones(5, 8), torch.zeros(5, 8)), []

    def all_halted(before: torch.Tensor, after: torch.Tensor, halted: torch.Tensor | None) -> torch.Tensor:
        seen.append(halted.float().mean().item())
        return halted.all(dim=1)

    with torch.no_grad():
        early, _, _ = loop(e, [None, None], rotary, fixed(30, 2), all_halted)
        late, _, _ = loop(e, [None, None], rotary, fixed(30, 2))
    assert len(seen) < 10
    assert seen[-1] == 1.0
    assert_close(early, late, rtol=1e-6, atol=1e-6)


def test_the_sum_that_training_minimises_includes_the_ponder_cost() -> None:
    config = tiny_config("looped", "d", "r", model__halting={"ponder_weight": 0.5})
    model = randomise(build_model(config), deviation=0.1)
    tokens = torch.arange(24).view(2, 12) % VOCABULARY
    training = model(tokens, tokens, fixed(3, 2))
    evaluation = model.eval()(tokens, tokens, fixed(3, 2))
    assert_close(training.cross_entropy, evaluation.cross_entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(evaluation.total, evaluation.cross_entropy)
    ponder_loss = training.measured["train/ponder_loss"].total
    assert_close(training.total - training.cross_entropy, ponder_loss, rtol=1e-4, atol=1e-5)
    assert_close(ponder_loss, 0.5 * training.measured["loop/ponder"].total)
    gate = model.loop.halting.gate.weight
    assert gradients(training.total.view(1), gate)[0].abs().sum() > 0
