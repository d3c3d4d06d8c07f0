import math

import pytest
import torch
from torch.testing import assert_close

from mythos.config.init_schema import Init
from mythos.model.init import initialise
from mythos.model.injection import INITIAL_DECAY, AdditiveInjection, LinearInjection, LTIInjection
from mythos.model.rules import Start
from tests.model.helpers import gradients, numbers, randomise
from tests.reference.newer_core import zero_order_hold


def test_it_computes_its_equation() -> None:
    module = randomise(LTIInjection(6), deviation=0.7)
    h, e = numbers(2, 3, 6, seed=3), numbers(2, 3, 6, seed=4)
    step = torch.log(1 + torch.exp(module.step_bias.double()))
    decay = torch.exp(-step * torch.exp(module.log_decay.double()))
    expected = decay * h.double() + step * (e.double() @ module.input.weight.double().T)
    assert_close(module(h, e).double(), expected, rtol=1e-5, atol=1e-6)
    assert module.spectral_radius().item() == pytest.approx(decay.max().item(), rel=1e-6)


@pytest.mark.parametrize("log_decay", [-12.0, -3.0, 0.0, 2.0])
def test_the_exact_form_and_its_gradients_equal_the_solution_of_its_differential_equation(log_decay: float) -> None:
    """Also near the limit of no decay, where (1 - a) / exp(log_decay) is 0 / 0."""
    module = randomise(LTIInjection(6, exact=True), deviation=0.7)
    module.log_decay.data += log_decay
    h, e = numbers(2, 3, 6, seed=3), numbers(2, 3, 6, seed=4)
    force = (e @ module.input.weight.T).flatten(0, 1)
    step = torch.log(1 + torch.exp(module.step_bias))
    slow = zero_order_hold(h.flatten(0, 1), force, module.log_decay, step).view(2, 3, 6)
    fast, inputs = module(h, e), (h, e, *module.parameters())
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    for own, reference in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        assert_close(own, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_decay", [-1000.0, -50.0, -17.0, 0.0, 17.0, 50.0, 1000.0])
@pytest.mark.parametrize("step_bias", [-1000.0, -50.0, 0.0, 50.0, 1000.0])
def test_spectral_radius_stays_below_one_whatever_was_learned(
    storage: torch.dtype, log_decay: float, step_bias: float, exact: bool
) -> None:
    module = LTIInjection(1, exact)
    module.log_decay.data.fill_(log_decay)
    module.step_bias.data.fill_(step_bias)
    torch.nn.init.eye_(module.input.weight)
    module = module.to(storage)
    radius = module.spectral_radius()
    assert radius.dtype == torch.float32
    assert 0 <= radius.item() < 1
    h, e = torch.ones(1, 1, 1, dtype=storage), torch.ones(1, 1, 1, dtype=storage)
    out = module(h, e)
    out.float().sum().backward()
    assert all(
        math.isfinite(value) for value in (out.item(), module.log_decay.grad.item(), module.step_bias.grad.item())
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_linear_forms_spectral_radius_equals_the_eigenvalues(seed: int) -> None:
    module = randomise(LinearInjection(12), seed=seed, deviation=0.4)
    expected = torch.linalg.eigvals(module.state.weight.double()).abs().max().item()
    assert module.spectral_radius().item() == pytest.approx(expected, rel=0.05)
    with torch.no_grad():  # a rotation: all eigenvalues are complex, of size 1.5
        module.state.weight.copy_(1.5 * torch.linalg.qr(torch.randn(12, 12)).Q)
    assert module.spectral_radius().item() == pytest.approx(1.5, rel=1e-4)


def test_the_forms_for_comparison_compute_their_equations() -> None:
    linear = randomise(LinearInjection(6))
    h, e = numbers(2, 3, 6, seed=3), numbers(2, 3, 6, seed=4)
    assert_close(linear(h, e), h @ linear.state.weight.T + e @ linear.input.weight.T)
    assert torch.equal(AdditiveInjection()(h, e), h + e)
    assert AdditiveInjection().spectral_radius() == 1


def test_linear_and_stable_injection_start_as_the_same_function() -> None:
    linear, stable = LinearInjection(6), LTIInjection(6)
    for module in (linear, stable):
        initialise(torch.nn.ModuleList([module]), Start(Init(), 6), seed=0)
    h, e = numbers(2, 3, 6, seed=3), numbers(2, 3, 6, seed=4)
    assert_close(linear(h, e), stable(h, e))
    assert stable.decay().tolist() == pytest.approx([INITIAL_DECAY] * 6)
