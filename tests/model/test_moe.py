from typing import Any

import pytest
import torch
from torch.testing import assert_close

import mythos.model.grouped
from mythos.config.model_schema import MixtureOfExperts
from mythos.model.moe import MoE, balance, expert_load, forget_load, moe_layers, observe_routing, routing_penalties
from mythos.model.precision import products_in
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.moe import slow_moe
from tests.synchronisations import count_synchronisations

SIZES = {"experts": 6, "experts_per_token": 2, "expert_hidden_size": 12, "shared_hidden_size": 4}
CONFIG = MixtureOfExperts(**SIZES)


def moe(**options: Any) -> MoE:
    module = randomise(MoE(8, MixtureOfExperts(**(SIZES | options))), deviation=0.5)
    module.router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4, 0.05]))
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scores": "softmax"},
        {"normalise": False, "route_scale": 2.5},
        {"groups": 3, "groups_per_token": 2, "experts_per_token": 3},
        {"groups": 2, "groups_per_token": 1, "scores": "softmax"},
    ],
)
@pytest.mark.parametrize("grouped", [True, False])
def test_moe_and_its_gradients_equal_the_definition(
    options: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mythos.model.grouped, "has_grouped_product", lambda *_: grouped)
    module, x = moe(**options), numbers(2, 7, 8)
    fast, slow = module(x), slow_moe(module, x)
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    inputs = (x, *module.parameters())
    for own, reference in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        assert_close(own, reference, rtol=1e-4, atol=1e-5)


def test_the_experts_never_wait_for_the_device() -> None:
    module, x = moe(), numbers(2, 7, 8)
    with count_synchronisations() as counted:
        module(x).square().sum().backward()
    assert not counted


def test_experts_in_bf16_over_fp32_weights_at_a_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"experts": 16, "experts_per_token": 4, "expert_hidden_size": 128, "shared_hidden_size": 128}
    module = randomise(MoE(256, MixtureOfExperts(**options)), deviation=0.06)
    x = numbers(2, 512, 256).detach().bfloat16()
    outcomes = {}
    for form in ("fp32", "slow", "grouped"):
        monkeypatch.setattr(mythos.model.grouped, "has_grouped_product", lambda *_, form=form: form == "grouped")
        own = (x.float() if form == "fp32" else x).requires_grad_()
        with products_in(torch.float32 if form == "fp32" else torch.bfloat16, torch.device("cpu")):
            y = module(own)
        assert y.dtype == own.dtype
        outcomes[form] = [y, *gradients(y.float(), own, *module.parameters())]
    for exact, slow, grouped in zip(*outcomes.values(), strict=True):
        assert grouped.dtype == slow.dtype
        assert (grouped.float() - exact).norm() < 6e-3 * exact.norm()
        assert (grouped.float() - slow.float()).norm() < 3e-3 * exact.norm()


def test_the_balance_bias_changes_the_choice_but_not_the_weights() -> None:
    module, x = moe(), numbers(1, 30, 8)
    module.router.e_score_correction_bias.fill_(0.0)
    module.router.e_score_correction_bias[3] = 10.0
    assert_close(module(x), slow_moe(module, x), rtol=1e-5, atol=1e-6)
    assert expert_load(module)[0, 3] == 30, "a large bias sends every token there"


def test_a_batch_without_sequences_passes_through() -> None:
    module = moe()
    assert module(torch.empty(0, 7, 8)).shape == (0, 7, 8)
    assert expert_load(module).sum() == 0


def test_load_counts_every_choice_since_the_last_reset() -> None:
    module = moe()
    module(numbers(3, 4, 8))
    module(numbers(2, 4, 8))
    assert expert_load(module).sum() == 5 * 4 * CONFIG.experts_per_token
    forget_load(moe_layers(module))
    assert expert_load(module).sum() == 0


def test_balance_moves_each_bias_by_the_rate_towards_the_mean_load() -> None:
    module = moe()
    before = module.router.e_score_correction_bias.clone()
    balance(module, torch.tensor([[10.0, 0.0, 4.0, 4.0, 2.0, 4.0]]), rate=0.01)
    moved = module.router.e_score_correction_bias - (before - before.mean())
    steps = torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.01, 0.0])
    assert_close(moved, steps - steps.mean())


def test_the_balance_bias_keeps_mean_zero() -> None:
    """One expert takes nearly all tokens: five signs of six are positive, at every step."""
    module = moe()
    module.router.e_score_correction_bias.zero_()
    for _ in range(2000):
        balance(module, torch.tensor([[95.0, 1.0, 1.0, 1.0, 1.0, 1.0]]), rate=0.01)
    assert abs(module.router.e_score_correction_bias.mean().item()) < 1e-6
    assert module.router.e_score_correction_bias[0] < -10


def test_balance_evens_out_a_lopsided_router() -> None:
    module, x = moe(), numbers(8, 16, 8).detach() + 0.5
    module.router.e_score_correction_bias.zero_()
    shares = []
    for _ in range(200):
        forget_load(moe_layers(module))
        module(x)
        load = expert_load(module)
        shares.append((load.max() / load.mean()).item())
        balance(module, load, rate=0.005)
    assert shares[0] > 1.3
    assert shares[-1] < 1.1


@pytest.mark.parametrize("groups", [None, 2])
def test_moe_equals_transformers_deepseek_v3(groups: int | None) -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    options = {"groups": groups, "groups_per_token": groups and 1, "route_scale": 2.5, "shared_hidden_size": 24}
    module = moe(**options)
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=8,
            moe_intermediate_size=12,
            n_routed_experts=6,
            n_shared_experts=2,
            num_experts_per_tok=2,
            n_group=groups or 1,
            topk_group=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    bias = module.router.e_score_correction_bias + 0.5  # theirs masks closed groups with 0, so all must be above
    module.router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        theirs.gate.weight.copy_(module.router.weight)
        theirs.gate.e_score_correction_bias.copy_(bias)
        for expert, mlp in enumerate(theirs.experts):
            gate, up = module.experts.gate_up_proj[expert].chunk(2)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(module.experts.down_proj[expert])
        gate, up = module.shared_experts.gate_up.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(module.shared_experts.down.weight)
    x = numbers(2, 7, 8)
    own_output, their_output = module(x), theirs(x)
    assert_close(own_output, their_output, rtol=1e-5, atol=1e-6)
    own = gradients(own_output, x, module.router.weight, module.shared_experts.down.weight)
    reference = gradients(their_output, x, theirs.gate.weight, theirs.shared_experts.down_proj.weight)
    for value, expected in zip(own, reference, strict=True):
        assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_the_routing_penalties_follow_their_definition() -> None:
    module = moe(balance_loss=0.3, router_z_loss=0.07)
    x = numbers(3, 5, 8)
    found = routing_penalties(observe_routing(module, x, module.config), module.config)
    for row in range(3):
        logits = x[row] @ module.router.weight.T
        scores = torch.sigmoid(logits)
        chosen = (scores + module.router.e_score_correction_bias).topk(2, dim=-1).indices
        balance_loss = 0.0
        for e in range(6):
            share = (chosen == e).sum().item() * 6 / (2 * 5)
            balance_loss = balance_loss + share * (scores[:, e] / scores.sum(dim=-1)).mean()
        z = torch.log(logits.exp().sum(dim=-1)).square().mean()
        assert_close(found[row], torch.stack((0.3 * balance_loss, 0.07 * z)))
