"""The initial weights of a model on many ranks: each parameter is made by one rank, on its device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos.model.init import Draw

Written = Callable[[nn.Parameter, int], AbstractContextManager[object]]
"""(parameter, rank) -> a block in which this rank writes the complete parameter, for all ranks; collective."""


@contextmanager
def broadcast(parameter: Tensor, rank: int) -> Iterator[None]:
    """All ranks have the parameter, and receive what this rank wrote at the end of the block. Collective."""
    yield
    dist.broadcast(parameter.data, rank)


@torch.no_grad()
def draw_by_ranks(draws: Mapping[nn.Parameter, Draw], device: torch.device, written: Written = broadcast) -> None:
    """Give every parameter its initial values. Collective.

    Orthogonalising the matrices takes by far the most time, so the ranks divide them: the largest parameters first, one
    for each rank at a time, so that the ranks have about the same work. No rank holds more than the values that it has
    drawn and one complete parameter.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    ordered = sorted(draws, key=lambda parameter: -_shape(parameter).numel())
    for first in range(0, len(ordered), ranks):
        together = ordered[first : first + ranks]
        own = draws[together[rank]](_shape(together[rank]), device) if rank < len(together) else None
        for owner, parameter in enumerate(together):
            with written(parameter, owner):
                if owner == rank and own is not None:
                    parameter.copy_(own)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the complete parameter; under ZeRO-3 its own is that of an empty vector."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
