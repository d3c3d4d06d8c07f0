"""Initial weights, in one place, the same on every rank and world size."""

import math
from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.attention import GroupedQueryAttention, LatentAttention
from mythos.model.core import Adapter
from mythos.model.halting import ACTHalting
from mythos.model.injection import LinearInjection, LTIInjection
from mythos.model.layers import SquaredReLU, SwiGLU, initial_deviation
from mythos.model.moe import Experts

INITIAL_DECAY = math.sqrt(1 / 5)
"""a of every channel at the start."""


@torch.no_grad()
def initialise(model: nn.Module, width: int, seed: int, mean_depth: float = 1.0) -> None:
    """Tables normal, matrices orthogonal, output projections zero, norms 1 (arXiv 2604.12946).

    Tables have standard deviation s = sqrt(2 / (5 width)); a matrix has orthonormal rows or columns, scaled so that
    its entries have root mean square s. Each parameter has a generator of its own, seeded by (seed, name): its values
    depend on nothing else.

    Args:
        mean_depth: trained depth; halting starts so that tokens halt there on average.
    """
    deviation = initial_deviation(width)
    zero = {id(parameter) for parameter in _output_projections(model)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        elif id(parameter) in zero:
            parameter.zero_()
        else:
            normal = _normal(parameter, f"{seed}/{name}")
            parameter.copy_(deviation * (normal if id(parameter) in tables else _orthogonal(normal)))
    for module in model.modules():
        _initialise_special(module, mean_depth)


def _initialise_special(module: nn.Module, mean_depth: float) -> None:
    match module:
        case LTIInjection():
            module.log_decay.zero_()
            module.step_bias.fill_(math.log(math.expm1(-math.log(INITIAL_DECAY))))
            nn.init.eye_(module.input.weight)
        case LinearInjection():  # where the stable form starts: the same function of (h, e)
            module.state.weight.copy_(INITIAL_DECAY * torch.eye(len(module.state.weight)))
            module.input.weight.copy_(-math.log(INITIAL_DECAY) * torch.eye(len(module.input.weight)))
        case ACTHalting():  # p = 1 / depth in every step: the sum reaches the threshold at that depth
            probability = min(1 / mean_depth, 0.99)
            module.gate.weight.zero_()
            module.gate.bias.fill_(math.log(probability / (1 - probability)))


def _output_projections(model: nn.Module) -> Iterator[Tensor]:
    """What writes into the residual stream: at zero, every block starts as the identity."""
    for module in model.modules():
        match module:
            case GroupedQueryAttention() | LatentAttention():
                yield module.out.weight
            case SwiGLU() | SquaredReLU():
                yield module.down.weight
            case Experts():
                yield module.down_proj
            case Adapter():
                yield module.up


def _normal(like: Tensor, key: str) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def _orthogonal(normal: Tensor) -> Tensor:
    """Matrices (the last two dimensions) with orthonormal rows or columns, scaled to entries of root mean square 1."""
    rows, columns = normal.shape[-2:]
    tall = normal if rows >= columns else normal.mT
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]  # uniform over orthogonal matrices
    return (q if rows >= columns else q.mT) * math.sqrt(max(rows, columns))
