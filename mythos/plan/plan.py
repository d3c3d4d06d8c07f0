"""The plan of a run on a cluster: everything that follows from the two, for people, scripts and the search."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from mythos.config.derive import micro_steps, tokens_per_step
from mythos.config.schema import Config
from mythos.plan.activations import kept_bytes
from mythos.plan.cache import cache_bytes
from mythos.plan.cluster import GIB, Cluster
from mythos.plan.communication import Collective, Loops, collectives
from mythos.plan.cost import Cost, cost
from mythos.plan.flops import expected_steps, inference_flops, recomputation_flops, training_flops
from mythos.plan.layout import Layout, layout_of
from mythos.plan.memory import Memory, memory, recomputes, snapshot_bytes
from mythos.plan.params import ParameterCount, count_parameters
from mythos.plan.precision import element_bytes
from mythos.plan.speed import StepTime, expected_loops, nodes, step_time

CACHE_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, with attention over the whole sequence as in the published tables; ``causal``: over half of it."""

    training: float
    training_causal: float
    recomputation: float
    inference: float
    """Of a forward pass at the mean depth."""
    inference_causal: float


@dataclass(frozen=True)
class Plan:
    """What a run needs and costs."""

    config: Config
    cluster: Cluster
    layout: Layout
    precision: str
    recompute: bool
    parameters: ParameterCount
    flops: Flops
    loops: Loops
    memory: Memory
    peak_with_recomputation: float
    peak_without_recomputation: float
    host_bytes: float
    """Of a node, for the asynchronous save."""
    collectives: tuple[Collective, ...]
    time: StepTime
    cost: Cost
    cache_bytes_per_sequence: int

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU and of a node is enough."""
        return self.memory.peak <= self.cluster.usable_bytes and self.host_bytes <= self.cluster.host_memory_gib * GIB

    @property
    def recomputes_in_vain(self) -> bool:
        """Whether the activations would fit without the recomputation that the configuration asks for."""
        return self.recompute and self.fits and self.peak_without_recomputation <= self.cluster.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return tokens_per_step(self.config) / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, as ``perf/mfu``: recomputation does not count."""
        peak = self.cluster.peak(self.precision) * self.layout.ranks
        return self.flops.training * self.tokens_per_second / peak

    @property
    def limit(self) -> str:
        """What the run would need more of first."""
        if not self.fits:
            return "memory" if self.memory.peak > self.cluster.usable_bytes else "host memory"
        parts = {
            "matrix products": self.time.products,
            "memory bandwidth": self.time.elementwise,
            "optimizer": self.time.update,
            "starting kernels": self.time.host,
            "data": self.time.data,
            f"communication ({self.largest_exchange()})": self.time.exposed,
        }
        return max(parts, key=lambda name: parts[name])

    def largest_exchange(self) -> str:
        """The purpose that takes most of the exposed communication, and whether it crosses nodes."""
        from mythos.plan.speed import seconds

        waited = [each for each in self.collectives if each.waited] or self.collectives
        if not waited:
            return "none"
        most = max(waited, key=lambda each: seconds(each, self.cluster))
        return f"{most.purpose}{' across nodes' if nodes(most.group) > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        return {
            "cluster": self.cluster.name,
            "gpus": self.layout.ranks,
            "nodes": self.layout.nodes,
            "expert_parallel_size": self.layout.expert_parallel_size,
            "zero_stage": self.config.parallel.zero_stage,
            "micro_batch_sequences": self.config.train.micro_batch_sequences,
            "accumulation": micro_steps(self.config, self.layout.ranks),
            "precision": self.precision,
            "recompute": self.recompute,
            "parameters": self.parameters.parts
            | {
                "total": self.parameters.total,
                "active": self.parameters.active,
                "lookup": self.parameters.tables,
                "matrix": self.parameters.matrices,
            },
            "training_flops_per_token": self.flops.training,
            "flops_per_token": asdict(self.flops),
            "loop_steps": asdict(self.loops),
            "memory_bytes": self.memory.kinds() | {"peak": self.memory.peak, "usable": self.cluster.usable_bytes},
            "peak_bytes_with_recomputation": self.peak_with_recomputation,
            "peak_bytes_without_recomputation": self.peak_without_recomputation,
            "host_bytes_per_node": self.host_bytes,
            "fits": self.fits,
            "communication": [asdict(each) for each in self.collectives],
            "step_seconds": self.time.total,
            "step_seconds_of": asdict(self.time),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "cost": {name: None if math.isinf(value) else value for name, value in asdict(self.cost).items()},
            "cache_bytes_per_sequence": self.cache_bytes_per_sequence,
            "limit": self.limit,
        }


def make_plan(config: Config, ranks: int, cluster: Cluster) -> Plan:
    """The plan of a configuration that is valid for this number of GPUs. Raises UserError."""
    layout = layout_of(config, ranks, cluster.gpus_per_node)
    size = element_bytes(config, cluster.is_gpu)
    recompute = recomputes(config, layout, cluster.is_gpu, cluster.usable_bytes)
    needed = memory(config, layout, size, cluster.is_gpu, recompute)
    other = replace(needed, activations=kept_bytes(config, size, not recompute))
    with_recomputation, without = (needed, other) if recompute else (other, needed)
    loops = expected_loops(config, layout)
    exchanged = tuple(collectives(config, layout, size, loops, recompute))
    time = step_time(config, layout, cluster, size, exchanged, recompute)
    return Plan(
        config=config,
        cluster=cluster,
        layout=layout,
        precision="bf16" if size.products == 2 else "fp32",
        recompute=recompute,
        parameters=count_parameters(config.model),
        flops=_flops(config),
        loops=loops,
        memory=needed,
        peak_with_recomputation=with_recomputation.peak,
        peak_without_recomputation=without.peak,
        host_bytes=snapshot_bytes(config, layout) * min(ranks, cluster.gpus_per_node),
        collectives=exchanged,
        time=time,
        cost=cost(config, layout, cluster, time.total),
        cache_bytes_per_sequence=cache_bytes(
            config.model,
            round(config.loop.mean_depth) if config.loop else 0,
            config.data.sequence_length,
            CACHE_ELEMENT_BYTES,
        ),
    )


def _flops(config: Config) -> Flops:
    model, length = config.model, config.data.sequence_length
    steps = expected_steps(config.loop)
    depth = steps.without_grad + steps.with_grad
    return Flops(
        training=training_flops(model, length, steps),
        training_causal=training_flops(model, length, steps, causal=True),
        recomputation=recomputation_flops(model, length, steps),
        inference=inference_flops(model, length, depth),
        inference_causal=inference_flops(model, length, depth, causal=True),
    )
