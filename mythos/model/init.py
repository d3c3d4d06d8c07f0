"""Initial weights, in one place, the same on every rank and world size."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.attention import GroupedQueryAttention, LatentAttention
from mythos.model.block import Adapter
from mythos.model.halting import ACTHalting
from mythos.model.injection import LinearInjection, LTIInjection
from mythos.model.layers import SquaredReLU, SwiGLU, initial_deviation
from mythos.model.moe import Experts

INITIAL_DECAY = math.sqrt(1 / 5)
"""a of every channel at the start."""


Gather = Callable[[nn.Parameter], AbstractContextManager[object]]
"""Makes a parameter whole while it is written, where it is spread over ranks; collective."""

Rule = Callable[[Tensor], Tensor]
"""Standard normal numbers in the parameter's shape -> its initial values."""


@torch.no_grad()
def initialise(model: nn.Module, width: int, seed: int, mean_depth: float = 1.0, gather: Gather = nullcontext) -> None:
    """Tables normal, matrices orthogonal, output projections zero, norms 1 (arXiv 2604.12946).

    Tables have standard deviation s = sqrt(2 / (5 width)); a matrix has orthonormal rows or columns, scaled so that
    its entries have root mean square s. Each parameter has a generator of its own, seeded by (seed, name): its values
    depend on nothing else.

    Args:
        mean_depth: trained depth; halting starts so that tokens halt there on average.
        gather: makes a parameter whole.
    """
    deviation = initial_deviation(width)
    rules: dict[int, Rule] = {}
    for module in model.modules():
        for parameter, rule in _rules(module, deviation, mean_depth).items():
            rules[id(parameter)] = rule
    for name, parameter in model.named_parameters():
        with gather(parameter):
            usual: Rule = torch.ones_like if parameter.ndim < 2 else lambda normal: deviation * _orthogonal(normal)
            parameter.copy_(rules.get(id(parameter), usual)(_normal(parameter.shape, f"{seed}/{name}")))


def _rules(module: nn.Module, deviation: float, mean_depth: float) -> dict[Tensor, Rule]:
    """The module's own parameters that are neither a norm nor an ordinary matrix.

    What writes into the residual stream starts at zero: every block starts as the identity.
    """
    keep = INITIAL_DECAY
    match module:
        case nn.Embedding():
            return {module.weight: lambda normal: deviation * normal}
        case GroupedQueryAttention() | LatentAttention():
            return {module.out.weight: torch.zeros_like}
        case SwiGLU() | SquaredReLU():
            return {module.down.weight: torch.zeros_like}
        case Experts():
            return {module.down_proj: torch.zeros_like}
        case Adapter():
            return {module.up: torch.zeros_like}
        case LTIInjection():
            step_bias = math.log(math.expm1(-math.log(keep)))
            return {
                module.log_decay: torch.zeros_like,
                module.step_bias: lambda normal: torch.full_like(normal, step_bias),
                module.input.weight: lambda normal: torch.eye(len(normal)),
            }
        case LinearInjection():  # where the stable form starts: the same function of (h, e)
            return {
                module.state.weight: lambda normal: keep * torch.eye(len(normal)),
                module.input.weight: lambda normal: -math.log(keep) * torch.eye(len(normal)),
            }
        case ACTHalting():  # p = 1 / depth in every step: the sum reaches the threshold at that depth
            probability = min(1 / mean_depth, 0.99)
            bias = math.log(probability / (1 - probability))
            return {
                module.gate.weight: torch.zeros_like,
                module.gate.bias: lambda normal: torch.full_like(normal, bias),
            }
    return {}


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
