"""Initial weights: the same on every rank and for every number of ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.parameters import Role, initial_rules, parameter_roles
from mythos.model.rules import Rule, Start, normal, orthogonal

Gather = Callable[[nn.Parameter], AbstractContextManager[object]]
"""Makes a parameter complete while it is written, where it is spread over ranks; collective."""


@torch.no_grad()
def initialise(model: nn.Module, start: Start, seed: int, gather: Gather = nullcontext) -> None:
    """Modules have their own rules; of the rest, tables are normal, matrices orthogonal, norms 1 (arXiv 2604.12946).

    Tables have standard deviation s = sqrt(2 / (5 width)); a matrix has orthonormal rows or columns, scaled so that
    its entries have root mean square s. Each parameter has its own generator, seeded by (seed, name): its values
    depend on nothing else.

    Args:
        gather: makes a parameter complete.
    """
    rules, roles = initial_rules(model, start), parameter_roles(model)
    for name, parameter in model.named_parameters():
        with gather(parameter):
            rule = rules.get(parameter) or _default_rule(parameter, roles[parameter], start.deviation)
            parameter.copy_(rule(_normal(parameter.shape, f"{seed}/{name}")))


def _default_rule(parameter: nn.Parameter, role: Role, deviation: float) -> Rule:
    if role == Role.TABLE:
        return normal(deviation)
    return torch.ones_like if parameter.ndim < 2 else orthogonal(deviation)


def _normal(shape: torch.Size, key: str) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
