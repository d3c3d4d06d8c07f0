"""The time of an optimizer step: computation, communication that nothing hides, and data.

    products      FLOPs, recomputation included, at the share of the peak that a model's products reach
    elementwise   memory traffic of norms, activations, rotations and copies, in proportion to the activations
    update        optimizer state read and written; Muon's Newton-Schulz products
    host          starting the kernels: beside them on a GPU, and exposed where it takes longer; before each on a CPU
    collectives   latency and bytes over the slowest link of the group (hierarchical rings: Thakur et al. 2005)

A gather that a module waits for, the exchange between experts and the updated weights are exposed. Prefetched gathers
and the reduction of gradients run beside the computation on a GPU, and are exposed where they take longer; on a CPU,
which has no streams, everything is exposed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos.config.depth_distribution import cumulative_distribution
from mythos.config.derive import micro_steps, tokens_per_step
from mythos.config.model_schema import Dense
from mythos.config.optim_schema import Muon
from mythos.config.schema import Config
from mythos.plan.activations import token_bytes
from mythos.plan.cluster import Cluster
from mythos.plan.communication import Collective, Loops
from mythos.plan.flops import LoopSteps, expected_steps, recomputation_flops, training_flops
from mythos.plan.layout import Group, Held, Layout, held_by_rank
from mythos.plan.precision import Bytes
from mythos.plan.tensors import Treatment

FORWARD_PASSES = 3.0
"""Times that the forward pass moves the bytes that it keeps: each is written once and read about twice."""
BACKWARD_PASSES = 6.0
"""The same for the backward pass, which also writes and reads the gradients."""
NEWTON_SCHULZ_STEPS = 5
HIDDEN_SHARE = 0.8
"""Of the computation, beside which collectives can run."""
BLOCK_KERNELS = 45
"""Kernels of a block's forward pass, run operation by operation; the backward pass has twice as many."""
EXPERT_KERNELS = 60
"""Those that AutoEP's layer adds."""
TOKEN_BYTES = 4
"""Of a token in the data."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    products: float
    elementwise: float
    update: float
    host: float
    """Starting kernels, as far as nothing hides it."""
    exposed: float
    """Communication that nothing hides."""
    hidden: float
    """Communication beside the computation."""
    data: float
    """Waiting for data, which are read during the step before."""

    @property
    def compute(self) -> float:
        """Without communication and data."""
        return self.products + self.elementwise + self.update + self.host

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.data


def expected_loops(config: Config, layout: Layout) -> Loops:
    """Of a micro-step: E[T] of a sequence, and E[max T] over the sequences of all ranks, with and without gradient.

    E[max over n] is the sum over t of 1 - F(t)^n, where F is the distribution of T.
    """
    loop = config.loop
    if loop is None:
        return Loops(0.0, 0.0, 0.0, 0.0)
    mean = expected_steps(loop)
    together = 1 if loop.depth == "poisson_per_batch" else config.train.micro_batch_sequences * layout.ranks
    longer = 1 - np.asarray(cumulative_distribution(loop, loop.mean_depth)) ** together
    executed, with_grad = float(longer.sum()), float(longer[: loop.backprop_depth].sum())
    return Loops(executed, with_grad, mean.without_grad + mean.with_grad, mean.with_grad)


def step_time(
    config: Config,
    layout: Layout,
    cluster: Cluster,
    size: Bytes,
    exchanged: Sequence[Collective],
    recompute: bool,
) -> StepTime:
    """The time of a step on this cluster."""
    precision = "bf16" if size.products == 2 else "fp32"
    rate = cluster.peak(precision) * cluster.product_share
    tokens, length = tokens_per_step(config) / layout.ranks, config.data.sequence_length
    steps, steps_of_loop = expected_steps(config.loop), expected_loops(config, layout)
    flops = training_flops(config.model, length, steps, causal=True)
    if recompute:
        flops += recomputation_flops(config.model, length, steps, causal=True)
    bandwidth = cluster.memory_bandwidth * cluster.memory_share
    products = tokens * flops / rate
    elementwise = tokens * _traffic(config, size, steps, recompute) / bandwidth
    update = _update_bytes(config, layout, size) / bandwidth + _muon_flops(config, layout) / rate
    starting = cluster.kernel_start_s * _kernels(config, layout, steps_of_loop, recompute)
    host = max(0.0, starting - products - elementwise) if cluster.is_gpu else starting
    waited = sum(seconds(each, cluster) for each in exchanged if each.waited)
    beside = sum(seconds(each, cluster) for each in exchanged if not each.waited)
    hidden = min(beside, HIDDEN_SHARE * (products + elementwise)) if cluster.is_gpu else 0.0
    exposed = waited + beside - hidden
    reading = tokens_per_step(config) * TOKEN_BYTES / cluster.storage_bandwidth
    data = max(0.0, reading - products - elementwise - update - host - exposed)
    return StepTime(products, elementwise, update, host, exposed, hidden, data)


def _kernels(config: Config, layout: Layout, loops: Loops, recompute: bool) -> float:
    """Kernels of all micro-steps of a rank."""
    model = config.model
    if isinstance(model, Dense):
        forward = backward = BLOCK_KERNELS * float(model.layers)
    else:
        outside = BLOCK_KERNELS * (model.prelude_layers + model.coda_layers)
        step = model.core_layers * (BLOCK_KERNELS + (EXPERT_KERNELS if model.core_experts else 0))
        forward = outside + step * (loops.executed + (loops.executed_with_grad if recompute else 0.0))
        backward = outside + step * loops.executed_with_grad
    return micro_steps(config, layout.ranks) * (forward + 2 * backward)


def _traffic(config: Config, size: Bytes, steps: LoopSteps, recompute: bool) -> float:
    """Bytes a token that elementwise work moves in all micro-steps."""
    kept = token_bytes(config.model, config.data.sequence_length, size)
    both = FORWARD_PASSES + BACKWARD_PASSES
    forward_of_loop = FORWARD_PASSES * (steps.without_grad + (steps.with_grad if recompute else 0.0))
    logits = config.model.vocabulary_size * (2 * size.products + 4 * 4)
    return both * (kept.outside + kept.loop_step * steps.with_grad) + forward_of_loop * kept.loop_step + logits


def _update_bytes(config: Config, layout: Layout, size: Bytes) -> float:
    """Weights, gradients and running means are read; weights and running means are written."""
    whole = config.parallel.zero_stage == 0
    total = 0.0
    for parameter in held_by_rank(config.model, layout):
        moments = 1 if _is_of_muon(config, parameter) else 2
        elements = parameter.size if whole else parameter.size / parameter.group.ranks
        total += elements * (size.gradients + 2 * 4 + 2 * moments * size.moments)
    return total


def _is_of_muon(config: Config, parameter: Held) -> bool:
    return isinstance(config.optim, Muon) and parameter.treatment in (Treatment.MATRIX, Treatment.EXPERT)


def _muon_flops(config: Config, layout: Layout) -> float:
    """Newton-Schulz steps of the matrices that a rank owns: X X^T, its square, and their product with X."""
    total = 0.0
    for parameter in held_by_rank(config.model, layout):
        if _is_of_muon(config, parameter):
            *_, rows, columns = parameter.shape
            short, long = sorted((rows // parameter.stacked, columns))
            matrices = parameter.size / (short * long)
            total += matrices * (4 * short**2 * long + 2 * short**3) / parameter.group.ranks
    return NEWTON_SCHULZ_STEPS * total


def seconds(collective: Collective, cluster: Cluster) -> float:
    """Time of all calls of a collective in a step."""
    group = collective.group
    inside, between = cluster.inside, cluster.between
    latency = inside.latency_s * math.log2(group.on_node) + between.latency_s * math.log2(nodes(group))
    return collective.calls * latency + _transfer(collective, cluster)


def nodes(group: Group) -> float:
    """Number of nodes with ranks of the group."""
    return max(1.0, group.ranks / group.on_node)


def _transfer(collective: Collective, cluster: Cluster) -> float:
    group = collective.group
    inside, between = cluster.inside.bytes_per_second, cluster.between.bytes_per_second
    across = group.ranks > group.on_node
    if collective.kind == "all_to_all":
        on_node = collective.bytes * (group.on_node - 1) / group.ranks / inside
        return max(on_node, collective.bytes * (group.ranks - group.on_node) / group.ranks / between)
    # Rings pass through every node; a node's GPUs send on all its adapters.
    rate = min(inside, between * group.on_node) if across else inside
    passes = 2 if collective.kind == "all_reduce" else 1
    return passes * collective.bytes * (group.ranks - 1) / group.ranks / rate
