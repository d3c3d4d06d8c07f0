"""The layouts of a run that fit a cluster, from the fastest or the cheapest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from mythos.config.derive import global_batch_sequences
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.plan.cluster import Cluster
from mythos.plan.plan import Plan, make_plan

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    fitting: list[Plan]
    """Best first."""
    least_memory: Plan | None
    """Where nothing fits: the layout that needs the least memory."""


def search(config: Config, cluster: Cluster, node_counts: Sequence[int], by: Literal["time", "cost"]) -> Found:
    """Try every layout: nodes, micro batch (accumulation follows), ZeRO stage, expert-parallel size, recomputation."""
    plans = [plan for nodes in node_counts for plan in _plans(config, cluster, nodes)]
    fitting = [plan for plan in plans if plan.fits]
    fitting.sort(key=lambda plan: plan.cost.days if by == "time" else plan.cost.dollars)
    least = min(plans, key=lambda plan: plan.memory.peak, default=None)
    return Found(fitting, None if fitting else least)


def _plans(config: Config, cluster: Cluster, nodes: int) -> Iterator[Plan]:
    ranks = nodes * cluster.gpus_per_node
    sequences = global_batch_sequences(config)
    micro_batches = [each for each in MICRO_BATCHES if sequences % (each * ranks) == 0]
    sizes = expert_parallel_sizes(config, ranks)
    recomputations = (True, False) if config.loop else (None,)
    for micro_batch, stage, size, recompute in product(micro_batches, STAGES, sizes, recomputations):
        yield make_plan(with_layout(config, micro_batch, stage, size, recompute), ranks, cluster)


def node_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({*_powers_of_2_up_to(most), most})


def by_nodes(plan: Plan) -> list[Plan]:
    """The plan's layout on other numbers of nodes, as far as its batch allows: from a quarter to 16 times as many."""
    config, per_node = plan.config, plan.cluster.gpus_per_node
    at_once = config.train.micro_batch_sequences * per_node
    counts = {max(1, plan.layout.nodes * factor // 4) for factor in (1, 2, 4, 8, 16, 32, 64)}
    fitting = [count for count in sorted(counts) if global_batch_sequences(config) % (at_once * count) == 0]
    return [make_plan(config, count * per_node, plan.cluster) for count in fitting]


def by_expert_parallel_size(plan: Plan) -> list[Plan]:
    """The plan's layout with other expert-parallel sizes; none without experts."""
    config, ranks = plan.config, plan.layout.ranks
    micro_batch, stage = config.train.micro_batch_sequences, config.parallel.zero_stage
    sizes = [size for size in expert_parallel_sizes(config, ranks) if size is not None]
    configs = [with_layout(config, micro_batch, stage, size, None) for size in sizes]
    return [make_plan(each, ranks, plan.cluster) for each in configs]


def expert_parallel_sizes(config: Config, ranks: int) -> list[int | None]:
    """Powers of 2 that divide the ranks and the experts; None alone without experts."""
    experts = config.model.core_experts if isinstance(config.model, Looped) else None
    if experts is None:
        return [None]
    return [size for size in _powers_of_2_up_to(ranks) if ranks % size == 0 and experts.experts % size == 0]


def with_layout(
    config: Config, micro_batch: int, stage: int, expert_parallel_size: int | None, recompute: bool | None
) -> Config:
    """The configuration with another layout; None: as it is."""
    parallel = _changed(config.parallel, zero_stage=stage)
    if expert_parallel_size is not None:
        parallel = _changed(parallel, expert_parallel_size=expert_parallel_size)
    loop = config.loop if recompute is None else _changed(config.loop, recompute=recompute)
    train = _changed(config.train, micro_batch_sequences=micro_batch)
    changed: Config = _changed(config, parallel=parallel, loop=loop, train=train)
    return changed


def _changed(section: Any, **options: Any) -> Any:
    return replace(section, **options)


def _powers_of_2_up_to(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2
