"""bf16 in the model: which tensors are rounded, sums of gradients, the same routing in recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mythos.model import build_model
from mythos.model.block import Block
from mythos.model.depth import fixed
from mythos.model.injection import LTIInjection
from mythos.model.loop import Loop
from mythos.model.moe import MoE, Router
from mythos.model.precision import FP32Linear, Linear, RMSNorm, products_in
from tests.model.helpers import numbers, randomise
from tests.tiny import MODELS, VOCABULARY, tiny_config

PATH = Path("unused")
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
INPUTS = {Block: FP32, LTIInjection: FP32, Loop: FP32, MoE: BF16}
OUTPUTS = {Block: FP32, LTIInjection: FP32, Loop: FP32, MoE: BF16, Linear: BF16, RMSNorm: BF16, FP32Linear: FP32}


def model_in(dtype: torch.dtype, kind: str, **options: Any) -> nn.Module:
    model = randomise(build_model(tiny_config(kind, PATH, PATH, **options)), deviation=0.15)
    model.product_type = dtype
    return model


def losses(kind: str, model: nn.Module, batch: int = 2, length: int = 15) -> Any:
    tokens = torch.randint(VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(3))
    return model(tokens[:, :-1], tokens[:, 1:], None if kind == "dense" else fixed(4, batch))


@pytest.mark.parametrize("kind", MODELS)
def test_only_products_are_in_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_in(BF16, kind), set()

    def check(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        for types, found in ((INPUTS, inputs[0]), (OUTPUTS, first)):
            for expected in (types[cls] for cls in types if isinstance(module, cls)):
                assert found.dtype == expected, type(module)
        seen.update(cls for cls in OUTPUTS if isinstance(module, cls))

    def attention(*inputs: Tensor, **options: Any) -> Tensor:
        assert {tensor.dtype for tensor in inputs} == {BF16}
        return own(*inputs, **options)

    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for module in model.modules():
        module.register_forward_hook(check)
    result = losses(kind, model)
    result.total.backward()
    assert result.total.dtype == FP32
    assert {parameter.grad.dtype for parameter in model.parameters()} == {FP32}
    assert {Block, Linear, RMSNorm} <= seen
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == FP32, "logits"


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_near_those_of_fp32(kind: str) -> None:
    flat, totals = [], []
    for dtype in (FP32, BF16):
        model = model_in(dtype, kind)
        totals.append(losses(kind, model).total)
        totals[-1].backward()
        flat.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert_close(totals[1], totals[0], rtol=2e-3, atol=0)
    assert (flat[1] - flat[0]).norm() < 0.03 * flat[0].norm()


def test_gradients_of_a_shared_weight_are_summed_in_fp32() -> None:
    """As over the steps of the loop, of which the first are without gradient."""
    layer, steps = randomise(Linear(8, 8)), [numbers(64, 8, seed=seed).detach().bfloat16() for seed in range(16)]
    with products_in(BF16, CPU):
        with torch.no_grad():
            layer(steps[0])
        sum(layer(x).float().sum() for x in steps).backward()
    each = [(torch.ones(8, 64, dtype=BF16) @ x).float() for x in steps]
    assert_close(layer.weight.grad, sum(each), rtol=1e-6, atol=1e-6)
    in_bf16 = sum(gradient.bfloat16() for gradient in each).float()
    assert (in_bf16 - sum(each)).norm() > 1e-3 * sum(each).norm(), "the test can tell the difference"


def test_the_product_has_the_gradients_of_its_rounded_factors() -> None:
    layer, x = randomise(Linear(6, 5)), numbers(2, 3, 6)
    with products_in(BF16, CPU):
        (layer(x) * numbers(2, 3, 5, seed=4).bfloat16()).sum().backward()
    exact_x, exact_w = (tensor.detach().bfloat16().float().requires_grad_() for tensor in (x, layer.weight))
    (F.linear(exact_x, exact_w) * numbers(2, 3, 5, seed=4).bfloat16().float()).sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == FP32
    assert_close(x.grad, exact_x.grad, rtol=1e-2, atol=1e-3)
    assert_close(layer.weight.grad, exact_w.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["looped-moe", "mythos"])
def test_router_logits_are_the_same_in_recomputation(kind: str) -> None:
    model, found = model_in(BF16, kind), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, _, output: found.append((module, output.detach())))
    result = losses(kind, model, batch=8, length=64)
    forward = len(found)
    result.total.backward()
    assert len(found) > forward > 0, "there was a recomputation"
    for module, recomputed in found[forward:]:
        assert any(module is other and torch.equal(recomputed, logits) for other, logits in found[:forward])
    assert len({logits.data_ptr() for _, logits in found}) == len(found), "all logits are kept"
