"""Initial weights: the same on every rank and for every number of ranks."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.layers import initial_deviation
from mythos.model.parameters import Role, Rule, initial_rules, parameter_roles

Gather = Callable[[nn.Parameter], AbstractContextManager[object]]
"""Makes a parameter complete while it is written, where it is spread over ranks; collective."""


@torch.no_grad()
def initialise(model: nn.Module, width: int, seed: int, mean_depth: float = 1.0, gather: Gather = nullcontext) -> None:
    """Modules have their own rules; of the rest, tables are normal, matrices orthogonal, norms 1 (arXiv 2604.12946).

    Tables have standard deviation s = sqrt(2 / (5 width)); a matrix has orthonormal rows or columns, scaled so that
    its entries have root mean square s. Each parameter has its own generator, seeded by (seed, name): its values
    depend on nothing else.

    Args:
        mean_depth: mean number of loop steps in training.
        gather: makes a parameter complete.
    """
    deviation = initial_deviation(width)
    rules, roles = initial_rules(model, mean_depth), parameter_roles(model)
    for name, parameter in model.named_parameters():
        with gather(parameter):
            rule = rules.get(parameter) or _default_rule(parameter, roles[parameter], deviation)
            parameter.copy_(rule(_normal(parameter.shape, f"{seed}/{name}")))


def _default_rule(parameter: nn.Parameter, role: Role, deviation: float) -> Rule:
    if role == Role.TABLE:
        return lambda normal: deviation * normal
    if parameter.ndim < 2:
        return torch.ones_like
    return lambda normal: deviation * _orthogonal(normal)


def _normal(shape: torch.Size, key: str) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _orthogonal(normal: Tensor) -> Tensor:
    """Matrices (the last two dimensions) with orthonormal rows or columns, scaled to entries of root mean square 1."""
    rows, columns = normal.shape[-2:]
    tall = normal if rows >= columns else normal.mT
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]  # uniform over orthogonal matrices
    return (q if rows >= columns else q.mT) * math.sqrt(max(rows, columns))
