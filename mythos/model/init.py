"""Initial weights: the same on every rank and for every number of ranks."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.parameters import Role, initial_rules, parameter_roles
from mythos.model.rules import Rule, Start, normal, orthogonal

Draw = Callable[[torch.Size, torch.device], Tensor]
"""(shape of the complete parameter, device to work on) -> its initial values."""


@torch.no_grad()
def initialise(model: nn.Module, start: Start, seed: int) -> None:
    """Give the parameters of a complete model their initial values, each on its own device: see ``initial_draws``."""
    for parameter, draw in initial_draws(model, start, seed).items():
        parameter.copy_(draw(parameter.shape, parameter.device))


def initial_draws(model: nn.Module, start: Start, seed: int) -> dict[nn.Parameter, Draw]:
    """Modules have their own rules; of the rest, tables are normal, matrices orthogonal, norms 1 (arXiv 2604.12946).

    Tables have standard deviation s = sqrt(2 / (5 width)); a matrix has orthonormal rows or columns, scaled so that
    its entries have root mean square s. Each parameter has its own generator, seeded by (seed, name): its values
    depend on nothing else, except that GPUs draw other numbers than CPUs, and one model of GPU others than the next.
    """
    rules, roles = initial_rules(model, start), parameter_roles(model)
    return {
        parameter: _draw(rules.get(parameter) or _default_rule(roles[parameter], start.deviation), f"{seed}/{name}")
        for name, parameter in model.named_parameters()
    }


def _draw(rule: Rule, key: str) -> Draw:
    return lambda shape, device: rule(_normal(shape, device, key))


def _default_rule(role: Role, deviation: float) -> Rule:
    if role == Role.TABLE:
        return normal(deviation)
    return lambda normal: torch.ones_like(normal) if normal.ndim < 2 else orthogonal(deviation)(normal)


def _normal(shape: torch.Size, device: torch.device, key: str) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
