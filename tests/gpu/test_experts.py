"""AutoEP's layer against the plain one, its fused kernels against the default ones, and the experts that are chosen."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mythos.config.model_schema import MixtureOfExperts
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model.moe import MoE, moe_layers, plain_parameters
from mythos.model.precision import products_in
from tests.experts import experts_as_on_a_gpu
from tests.gpu.training import config_for, relative_error, train
from tests.model.helpers import randomise

Record = Callable[[str, float, str], None]
WIDTHS = {"cpu": 64, "cuda": 1280}
TOKENS = {"cpu": (0, 1, 300), "cuda": (0, 1, 16_384)}
EXPERTS = {"experts": 16, "experts_per_token": 4, "expert_hidden_size": 304, "shared_hidden_size": 304}


def expert_config(device: torch.device, **overrides: Any) -> Config:
    """A looped model whose experts have the flagship's hidden size."""
    width = WIDTHS[device.type]
    return config_for(device, "looped-moe", model__width=width, model__core_experts=EXPERTS, **overrides)


def converted_and_plain(device: torch.device) -> tuple[Any, MoE]:
    """AutoEP's layer in bf16, and the plain layer with the same weights in fp32."""
    config = expert_config(device, precision="bf16", parallel__zero_stage=2)
    with experts_as_on_a_gpu():
        engine = TrainingEngine(config, device)
    randomise(engine.module, deviation=0.05)
    layer = moe_layers(engine.module)[0]
    plain = MoE(config.model.width, MixtureOfExperts(**EXPERTS))
    converted = dict(layer.named_parameters(prefix="layer"))
    for name, parts in plain_parameters(converted).items():
        weight = torch.cat([converted[part].detach().float() for part in parts], dim=1 if len(parts) > 1 else 0)
        plain.get_parameter(name.removeprefix("layer.")).data = weight
    return layer, plain.to(device)


def layer_errors(device: torch.device) -> dict[str, float]:
    """Relative errors of outputs and input gradients, for several numbers of tokens, and for few experts chosen.

    Tokens for which rounding changes the choice of experts are left out; their share is among the results.
    """
    layer, plain = converted_and_plain(device)
    found = {}
    for few in (False, True):
        bias = torch.zeros(EXPERTS["experts"], device=device)
        if few:
            bias[: EXPERTS["experts_per_token"]] = 100.0
        for each in (layer, plain):
            each.router.e_score_correction_bias.copy_(bias)
        for tokens in TOKENS[device.type]:
            x = torch.randn(1, tokens, WIDTHS[device.type], generator=torch.Generator().manual_seed(tokens)).to(device)
            x = x.bfloat16()
            ours, reference = (_outputs(each, x.to(dtype)) for each, dtype in ((layer, x.dtype), (plain, torch.float)))
            (_, chosen, _), logits = layer.router(x[0], None), plain.router(x[0].float())
            scores = torch.sigmoid(logits) + bias
            same = (chosen.sort().values == scores.topk(chosen.shape[1]).indices.sort().values).all(dim=-1)
            name = f"{tokens} tokens" + (", few experts" if few else "")
            errors = [relative_error(a[0][same], b[0][same]) for a, b in zip(ours, reference, strict=True)]
            found[name] = max(errors)
            if tokens > 1:
                found[f"share of {name} with other experts"] = 1 - same.float().mean().item()
    return found


def _outputs(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with products_in(x.dtype, x.device):
        output = layer(x)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]


def test_experts_in_bf16(here: Callable[..., Any], record: Record) -> None:
    found = here(layer_errors)
    for name, error in found.items():
        limit = 5e-2 if "other experts" in name else 2e-2
        record(name, error, f"<= {limit:g}")
        assert error <= limit, name


def fused_errors(device: torch.device) -> tuple[dict[str, str], float]:
    """The forms of AutoEP's layer, and the largest error of the fused ones against the others."""
    layer, _ = converted_and_plain(device)
    forms = {"combine": layer.combine_impl, "gate and up": layer.experts.gate_up_impl}
    errors = []
    fused_combine = "fused_weighted_sum" if device.type == "cuda" else "weighted_sum"  # a Triton kernel
    for tokens in TOKENS[device.type]:
        x = torch.randn(1, tokens, WIDTHS[device.type], generator=torch.Generator().manual_seed(tokens)).to(device)
        outputs = []
        for combine, gate_up in (("weighted_sum", "separate"), (fused_combine, "fused")):
            layer.combine_impl, layer.experts.gate_up_impl = combine, gate_up
            outputs.append(_outputs(layer, x.bfloat16()))
        errors += [relative_error(a, b) for a, b in zip(*outputs, strict=True)]
    return forms, max(errors)


def test_fused_kernels(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    forms, error = here(fused_errors)
    record(f"{forms}", error, "<= 1e-2")
    assert error <= 1e-2
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        assert forms == {"combine": "fused_weighted_sum", "gate and up": "fused"}


def recomputed_choices(device: torch.device, steps: int) -> tuple[int, int]:
    """(calls of routers that were recomputed, those of them that chose other experts), while a model learns in bf16."""
    config = expert_config(
        device, precision="bf16", loop__recompute=True, loop__depth="fixed", train__steps=steps, train__z_loss=1e-4
    )
    engine = TrainingEngine(config, device)
    calls: list[list[Tensor]] = [[] for _ in moe_layers(engine.module)]
    recomputed = different = 0
    with ExitStack() as hooks:
        for layer, its_calls in zip(moe_layers(engine.module), calls, strict=True):

            def keep(_: Any, __: Any, output: tuple[Tensor, ...], its_calls: list[Tensor] = its_calls) -> None:
                its_calls.append(output[1].detach().clone())

            hooks.callback(layer.router.register_forward_hook(keep).remove)
        for step in range(steps):
            for its_calls in calls:
                its_calls.clear()
            train(engine, config, 1, step)
            depth = 3  # loop steps, of which the last two have gradient and are recomputed, the last one first
            for its_calls in calls:
                assert len(its_calls) == depth + 2
                for forward, again in ((its_calls[2], its_calls[3]), (its_calls[1], its_calls[4])):
                    recomputed += 1
                    different += not torch.equal(forward, again)
    return recomputed, different


def test_recomputation_chooses_the_same_experts(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    steps = {"cpu": 3, "cuda": 20}[device.type]
    recomputed, different = here(recomputed_choices, steps)
    record(f"calls of routers with other choices, of {recomputed}", different, "0")
    assert recomputed == 2 * 2 * steps
    assert different == 0
