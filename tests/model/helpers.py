"""Modules with generic weights (none zero, none symmetric), inputs and gradients."""

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int = 0, deviation: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return module


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(output: Tensor, *inputs: Tensor, seed: int = 2) -> tuple[Tensor, ...]:
    """Gradients of a random projection of the output."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((output * weights).sum(), inputs, allow_unused=False)
