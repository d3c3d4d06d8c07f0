import torch
from torch.testing import assert_close

from mythos.config.schema import MixtureOfExperts
from mythos.model.moe import MoE, balance, expert_load, forget_load, moe_layers
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.moe import slow_moe

CONFIG = MixtureOfExperts(experts=5, experts_per_token=2, expert_hidden_size=6, shared_hidden_size=4)


def moe() -> MoE:
    module = randomise(MoE(8, CONFIG), deviation=0.5)
    module.router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4]))
    return module


def test_moe_and_its_gradients_equal_the_definition() -> None:
    module, x = moe(), numbers(2, 7, 8)
    fast, slow = module(x), slow_moe(module, x)
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    inputs = (x, *module.parameters())
    for own, reference in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        assert_close(own, reference, rtol=1e-4, atol=1e-5)


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


def test_load_counts_every_choice_since_it_was_forgotten() -> None:
    module = moe()
    module(numbers(3, 4, 8))
    module(numbers(2, 4, 8))
    assert expert_load(module).sum() == 5 * 4 * CONFIG.experts_per_token
    forget_load(moe_layers(module))
    assert expert_load(module).sum() == 0


def test_balance_moves_each_bias_by_the_rate_towards_the_mean_load() -> None:
    module = moe()
    before = module.router.e_score_correction_bias.clone()
    balance(module, torch.tensor([[10.0, 0.0, 4.0, 4.0, 2.0]]), rate=0.01)
    moved = module.router.e_score_correction_bias - before
    assert_close(moved, torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.01]))


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
