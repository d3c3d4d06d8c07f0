"""The loss in bf16, fp32 on both devices, bf16 against fp32, and attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import GroupedQuery, Latent
from mythos.loss import cross_entropy_and_z_loss
from mythos.model import build_model
from mythos.model.attention import build_attention
from mythos.model.depth import fixed
from mythos.model.precision import products_in
from tests.gpu.training import config_for, largest_difference, losses, relative_error
from tests.model.helpers import randomise
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY

Record = Callable[[str, float, str], None]
LOSS_SIZES = {"cpu": (1024, 4096, 64), "cuda": (16_384, 32_768, 1280)}
"""Tokens, vocabulary, width."""


def errors_of_the_loss(device: torch.device) -> tuple[float, float]:
    """Relative errors in bf16 of the loss and of the head's gradient, against fp32 with the same numbers."""
    tokens, vocabulary, width = LOSS_SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(1, tokens, width, generator=generator, device=device).bfloat16()
    head = (torch.randn(vocabulary, width, generator=generator, device=device) * 2 * width**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (1, tokens), generator=generator, device=device)
    found = cross_entropy_and_z_loss(hidden, head.requires_grad_(), targets)
    (gradient,) = torch.autograd.grad(found.total, head)
    exact, exact_gradient = 0.0, torch.zeros(vocabulary, width, device=device)
    for part, its_targets in zip(hidden[0].float().split(1024), targets[0].split(1024), strict=True):
        weight = head.detach().float().requires_grad_()
        loss = F.cross_entropy(F.linear(part, weight), its_targets, reduction="sum") / tokens
        exact_gradient += torch.autograd.grad(loss, weight)[0]
        exact += loss.item()
    return abs(found.total.item() / exact - 1), relative_error(gradient, exact_gradient)


def test_loss_in_bf16(here: Callable[..., Any], record: Record) -> None:
    loss, gradient = here(errors_of_the_loss)
    record("loss", loss, "<= 1e-4")
    record("gradient of the head", gradient, "<= 5e-3")
    assert loss <= 1e-4
    assert gradient <= 5e-3


def plain_losses(device: torch.device, kind: str) -> list[float]:
    """Three steps of AdamW in fp32 from the same weights and, for the loop, the state zero, on any device."""
    overrides = {} if kind == "dense" else {"model__initial_state": "zero"}
    model = randomise(build_model(config_for(device, kind, **overrides)), deviation=0.1).to(device)
    tokens = torch.randint(VOCABULARY, (8, SEQUENCE_LENGTH + 1), generator=torch.Generator().manual_seed(0)).to(device)
    plan = () if kind == "dense" else (fixed(3, 8),)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    found = []
    for _ in range(3):
        total = model(tokens[:, :-1], tokens[:, 1:], *plan).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item())
    return found


@pytest.mark.parametrize("kind", ["dense", "published", "mythos"])
def test_fp32_is_the_same_as_on_a_cpu(kind: str, here: Callable[..., Any], record: Record) -> None:
    expected = plain_losses(torch.device("cpu"), kind)
    difference = largest_difference(here(plain_losses, kind), expected)
    record(kind, difference, "<= 1e-4")
    assert expected[2] < expected[0]
    assert difference <= 1e-4


@pytest.mark.parametrize("kind", ["dense", "published", "mythos"])
def test_bf16_follows_fp32(kind: str, device: torch.device, here: Callable[..., Any], record: Record) -> None:
    steps = {"cpu": 5, "cuda": 50}[device.type]
    curves = [
        here(losses, config_for(device, kind, precision=precision, train__steps=steps), steps)
        for precision in ("bf16", "fp32")
    ]
    difference = largest_difference(*curves)
    record(f"{kind}, {steps} steps", difference, "<= 1e-2")
    assert curves[1][-1] < curves[1][0]
    assert difference <= 1e-2


HEADS = {
    "128/128": GroupedQuery(kind="gqa", heads=4, kv_heads=4, head_size=128),
    "192/128": Latent(
        kind="mla",
        heads=4,
        query_latent_size=256,
        key_value_latent_size=128,
        content_head_size=128,
        rotary_head_size=64,
        value_head_size=128,
    ),
}


def attention_errors(device: torch.device, heads: str, length: int) -> tuple[list[float], set[str]]:
    """Errors in bf16 of outputs and gradients for 0 to 8 sequences, and the attention operations that were used."""
    module = randomise(build_attention(512, HEADS[heads], False), deviation=0.05).to(device)
    found, operations = [], set()
    for batch in range(9):
        x = torch.randn(batch, length, 512, generator=torch.Generator().manual_seed(batch)).to(device)
        with torch.profiler.profile() as profile, products_in(torch.bfloat16, device):
            ours = _output_and_gradient(module, x.bfloat16())
        operations |= {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
        if batch:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                reference = _output_and_gradient(module, x.bfloat16().float())
            found += [relative_error(a, b) for a, b in zip(ours, reference, strict=True)]
    return found, operations


def _output_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    rotary = module.rotary(x.shape[1], x.device)  # type: ignore[operator]
    output = module(x, rotary, None)
    return output.detach(), torch.autograd.grad(output.sum(), x)[0]


@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: str, device: torch.device, here: Callable[..., Any], record: Record) -> None:
    errors, operations = here(attention_errors, heads, {"cpu": 16, "cuda": 2048}[device.type])
    record(f"{heads}: {', '.join(sorted(operations))}", max(errors), "<= 2e-2 against math in fp32; never math")
    assert max(errors) <= 2e-2
    if device.type == "cuda":
        assert not [name for name in operations if "math" in name]
