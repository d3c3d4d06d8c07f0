"""Which experts the tokens go to at each loop step, watched from outside the model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mythos.model.moe import Routing


@contextmanager
def watched_routing(core: Iterable[nn.Module], see: Callable[[Routing], None]) -> Iterator[None]:
    """Within it, ``see`` gets the routing of every call of a core block with experts, in order."""

    def request(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments[:-1], True)

    def routed(_: Any, __: Any, output: Any) -> None:
        if output.routing is not None:
            see(output.routing)

    handles = []
    for block in core:
        handles += [block.register_forward_pre_hook(request), block.register_forward_hook(routed)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ExpertLoad:
    """Counts the tokens' choices by core layer, loop step and expert, at one depth, where no sequence leaves early.

    Args:
        core: the blocks of the core, all with experts.
        depth: loop steps.
    """

    def __init__(self, core: Iterable[nn.Module], depth: int, experts: int, device: torch.device) -> None:
        self._core, self.depth = list(core), depth
        self._choices_TLE = torch.zeros(depth, len(self._core), experts, dtype=torch.float64, device=device)

    @contextmanager
    def counted(self, sequences: int) -> Iterator[None]:
        """Within it, a forward pass at this depth is counted: its first ``sequences``, the rest are padding."""
        calls: list[Tensor] = []
        with watched_routing(self._core, lambda routing: calls.append(routing.chosen_BSE[:sequences].sum(dim=(0, 1)))):
            yield
        for choices_LE, counted_LE in zip(torch.stack(calls).split(len(self._core)), self._choices_TLE, strict=True):
            counted_LE += choices_LE

    def shares_LTE(self) -> Tensor:
        """The experts' shares of the choices of each layer and loop step, over all ranks. Collective."""
        dist.all_reduce(self._choices_TLE)
        return (self._choices_TLE / self._choices_TLE.sum(dim=-1, keepdim=True)).transpose(0, 1).cpu()
