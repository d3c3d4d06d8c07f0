"""Which ranks a parameter is spread over, and which of them are on one node."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from mythos.config.derive import expert_parallel_size
from mythos.config.model_schema import Dense, Looped
from mythos.config.schema import Config
from mythos.plan.tensors import Parameter, Treatment, parameters


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: ``ranks`` of them, ``on_node`` on the same node."""

    ranks: int
    on_node: int


@dataclass(frozen=True)
class Layout:
    """The ranks of a run; consecutive ones are on the same node, and consecutive ones share a set of experts."""

    ranks: int
    ranks_per_node: int
    expert_parallel_size: int = 1

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def everyone(self) -> Group:
        """All ranks: those over which ZeRO distributes everything but the routed experts."""
        return Group(self.ranks, min(self.ranks, self.ranks_per_node))

    @property
    def sharing(self) -> Group:
        """The ranks that share a set of experts and exchange tokens."""
        size = self.expert_parallel_size
        return Group(size, min(size, self.ranks_per_node))

    @property
    def replicas(self) -> Group:
        """The ranks that have the same experts: those over which ZeRO distributes them."""
        size = self.ranks // self.expert_parallel_size
        return Group(size, max(1, min(size, self.ranks_per_node // self.expert_parallel_size)))


def layout_of(config: Config, ranks: int, ranks_per_node: int) -> Layout:
    """The layout of a run on so many ranks."""
    hosts = [str(rank // ranks_per_node) for rank in range(ranks)]
    return Layout(ranks, ranks_per_node, expert_parallel_size(config, hosts))


@dataclass(frozen=True)
class Held:
    """A parameter as DeepSpeed holds it on one rank: the experts of this rank only, gate and up separately."""

    name: str
    shape: tuple[int, ...]
    treatment: Treatment
    group: Group
    stacked: int = 1

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def padded(self) -> int:
        """The elements with padding to equal parts for the ranks of the group, as ZeRO-3 gathers and reduces them."""
        return -(-self.size // self.group.ranks) * self.group.ranks


def held(of_model: Sequence[Parameter], layout: Layout) -> list[Held]:
    """The parameters on one rank, in the order in which DeepSpeed creates them (AutoEP's experts and routers last)."""
    dense, experts, routers = [], [], []
    for parameter in of_model:
        own = Held(parameter.name, parameter.shape, parameter.treatment, layout.everyone, parameter.stacked)
        if parameter.treatment is Treatment.ROUTER:
            routers.append(own)
        elif parameter.treatment is not Treatment.EXPERT:
            dense.append(own)
        else:
            count, rows, columns = parameter.shape
            part = (count // layout.expert_parallel_size, rows // parameter.stacked, columns)
            single = replace(own, shape=part, stacked=1, group=layout.replicas)
            experts += [replace(single, name=f"{parameter.name}.{number}") for number in range(parameter.stacked)]
    return dense + experts + routers


@cache
def held_by_rank(model: Looped | Dense, layout: Layout) -> tuple[Held, ...]:
    """The parameters of a model on one rank."""
    return tuple(held(parameters(model), layout))
