"""Initial weights, in one place, the same on every rank and world size."""

import math
from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor, nn

from mythos.model.attention import GroupedQueryAttention
from mythos.model.injection import LTIInjection
from mythos.model.layers import SquaredReLU, SwiGLU
from mythos.model.moe import Experts

INITIAL_DECAY = math.sqrt(1 / 5)
"""a of every channel at the start."""


@torch.no_grad()
def initialise(model: nn.Module, width: int, seed: int) -> None:
    """Normal weights of standard deviation sqrt(2 / (5 width)), zero output projections, norms at 1 (arXiv 2604.12946).

    Each parameter has a generator of its own, seeded by (seed, name): its values depend on nothing else.
    """
    deviation = math.sqrt(2 / (5 * width))
    zero = {id(parameter) for parameter in _output_projections(model)}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        elif id(parameter) in zero:
            parameter.zero_()
        else:
            parameter.copy_(_normal(parameter, deviation, f"{seed}/{name}"))
    for module in model.modules():
        if isinstance(module, LTIInjection):
            step = -math.log(INITIAL_DECAY)
            module.log_decay.zero_()
            module.step_bias.fill_(math.log(math.expm1(step)))
            nn.init.eye_(module.input.weight)


def _output_projections(model: nn.Module) -> Iterator[Tensor]:
    """What writes into the residual stream: at zero, every block starts as the identity."""
    for module in model.modules():
        match module:
            case GroupedQueryAttention():
                yield module.out.weight
            case SwiGLU() | SquaredReLU():
                yield module.down.weight
            case Experts():
                yield module.down_proj


def _normal(like: Tensor, deviation: float, key: str) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return torch.normal(0.0, deviation, like.shape, generator=torch.Generator().manual_seed(seed))
