"""Memory of one rank, by kind, and the host memory of the asynchronous save.

Weights, gradients and optimizer state follow from ZeRO's partitions (Rajbhandari et al. 2020, arXiv 1910.02054), the
rest from what the engine keeps beside them. Not everything is there at a time; the peak is the largest of

    forward     activations, the logits of a chunk, gathered weights
    backward    gradients, those on their way to the ranks that keep them, gathered weights, activations of the prelude
    update      gradients, what Muon exchanges and orthogonalises

on top of weights and optimizer state. Sums of gradients are there in the forward pass, too, under ZeRO 3 and with
several micro-steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from mythos.config.derive import micro_steps
from mythos.config.model_schema import Looped
from mythos.config.optim_schema import Muon
from mythos.config.schema import Config
from mythos.plan.activations import CHUNK_LOGITS, FP32, kept_bytes, prelude_bytes
from mythos.plan.communication import optimizer_groups, reduce_buckets, sub_groups
from mythos.plan.gathers import DEEPSPEED, Limits, micro_step
from mythos.plan.layout import Held, Layout, held_by_rank
from mythos.plan.precision import Bytes, element_bytes
from mythos.plan.tensors import Treatment

UPDATE_COPIES, COMPLETE_UPDATE_COPIES = 5, 6
"""Tensors of the size of what Muon updates at a time: direction, update, decay, their sum, and that times the rate;
for complete parameters also the weights, end to end."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind; ``peak`` is less than their sum, since some are there only while others are not."""

    weights: float
    gradients: float
    kept_gradients: float
    """Of these, what is there while a forward pass runs."""
    optimizer: float
    """Running means; under ZeRO 1 and 2 also the weights that this rank updates, which DeepSpeed copies."""
    gathered: float
    """Complete weights that ZeRO 3 has gathered, at most: the core of a looped model, and what is prefetched."""
    activations: float
    """Of the deepest micro batch, with recomputation as configured."""
    prelude: float
    """Of these, what is left when the loop's gradients are complete."""
    logits: float
    """The loss: the logits of a chunk, the gradients of the head and of its input."""
    experts: float
    """Rows on their way to experts and back, of one layer."""
    communication: float
    """Gradients on their way to the ranks that keep them."""
    update: float
    """Gradients, and what Muon exchanges and orthogonalises; 0 for AdamW, which updates in place."""

    @property
    def peak(self) -> float:
        """The most that is needed at a time."""
        forward = self.kept_gradients + self.gathered + self.activations + self.logits + self.experts
        backward = self.gradients + self.gathered + self.communication + self.prelude
        return self.weights + self.optimizer + max(forward, backward, self.update)

    def kinds(self) -> dict[str, float]:
        """Bytes by name, without those that are a part of others."""
        names = [field.name for field in fields(self) if field.name not in ("kept_gradients", "prelude")]
        return {name: getattr(self, name) for name in names}


def memory(
    config: Config, layout: Layout, size: Bytes, on_gpu: bool, recompute: bool, limits: Limits = DEEPSPEED
) -> Memory:
    """The memory of a rank."""
    parameters, stage = held_by_rank(config.model, layout), config.parallel.zero_stage
    complete = sum(parameter.size for parameter in parameters)
    part = _part(parameters)
    kept = [p for p in parameters if stage == 3 and p.size <= config.parallel.persistent_parameter_elements]
    weights = part + sum(parameter.size for parameter in kept) if stage == 3 else complete
    state = sum(_moments(config, p) * (p.size / p.group.ranks if stage else p.size) for p in parameters) * size.moments
    gathered = 0.0
    if stage == 3:
        found = micro_step(config.model, layout, config.parallel.persistent_parameter_elements, limits)
        gathered = found.peak_elements * size.weights
    gradients = (part if stage >= 2 else complete) * size.gradients
    return Memory(
        weights=weights * size.weights,
        gradients=gradients,
        kept_gradients=gradients if stage == 3 or micro_steps(config, layout.ranks) > 1 else 0.0,
        optimizer=state + (part * size.weights if stage in (1, 2) else 0),
        gathered=gathered,
        activations=kept_bytes(config, size, recompute),
        prelude=prelude_bytes(config, size),
        logits=_logits(config, size, on_gpu),
        experts=_expert_rows(config, size),
        communication=_communication(config, parameters, size, on_gpu, limits),
        update=_update(config, parameters, size, limits),
    )


def recomputes(config: Config, layout: Layout, on_gpu: bool, usable_bytes: float) -> bool:
    """Whether loop steps are recomputed; ``auto``: where a rank would need more memory without.

    Args:
        usable_bytes: of the smallest device of all ranks.
    """
    if config.loop is None or config.loop.recompute != "auto":
        return config.loop is not None and config.loop.recompute is True
    size = element_bytes(config, on_gpu)
    return memory(config, layout, size, on_gpu, recompute=False).peak > usable_bytes


def _part(parameters: Sequence[Held]) -> float:
    """Elements of one rank when every parameter is divided among its group."""
    return sum(parameter.padded / parameter.group.ranks for parameter in parameters)


def _moments(config: Config, parameter: Held) -> int:
    """Running means that the optimizer keeps: AdamW two, Muon one."""
    of_muon = isinstance(config.optim, Muon) and parameter.treatment in (Treatment.MATRIX, Treatment.EXPERT)
    return 1 if of_muon else 2


def _logits(config: Config, size: Bytes, on_gpu: bool) -> float:
    vocabulary, width = config.model.vocabulary_size, config.model.width
    tokens = config.train.micro_batch_sequences * config.data.sequence_length
    chunk = min(CHUNK_LOGITS[on_gpu], tokens * vocabulary)
    logits = chunk * (size.products + 2 * FP32)  # as a product, in fp32, and their log-softmax
    return logits + vocabulary * width * FP32 + tokens * width * size.products


def _expert_rows(config: Config, size: Bytes) -> float:
    if not isinstance(config.model, Looped) or config.model.core_experts is None:
        return 0.0
    tokens = config.train.micro_batch_sequences * config.data.sequence_length
    rows = tokens * config.model.core_experts.experts_per_token * config.model.width
    return 2.0 * rows * size.products


def _communication(config: Config, parameters: Sequence[Held], size: Bytes, on_gpu: bool, limits: Limits) -> float:
    complete = sum(parameter.size for parameter in parameters)
    if all(parameter.group.ranks == 1 for parameter in parameters) and config.parallel.zero_stage == 0:
        return 0.0
    if config.parallel.zero_stage == 3:
        buckets = reduce_buckets(config, parameters, limits.reduce)
        largest = max(sum(parameter.size for parameter in bucket) for bucket in buckets)
    else:
        largest = min(limits.reduce, complete)
    # DeepSpeed allocates its buffer completely: twice where reducing overlaps with the backward pass. A CPU's memory is
    # used only where something is written. ZeRO 0 has no buffer; 0 and 3 copy what is reduced, 2 the sums at the end.
    buffers = 2 * limits.reduce if on_gpu else largest
    copied = {0: largest, 1: 0, 2: _part(parameters), 3: largest}[config.parallel.zero_stage]
    if config.parallel.zero_stage == 3:  # the loop's gradients are complete before the first of them is reduced
        copied += sum(parameter.size for parameter in parameters if parameter.name.startswith("loop."))
    return float((buffers if config.parallel.zero_stage else 0) + copied) * size.reduced


def _update(config: Config, parameters: Sequence[Held], size: Bytes, limits: Limits) -> float:
    if not isinstance(config.optim, Muon):
        return 0.0
    stage, largest = config.parallel.zero_stage, 0.0
    for group in optimizer_groups(config, parameters):
        if group[0].treatment in (Treatment.MATRIX, Treatment.EXPERT):
            for together in sub_groups(group, limits.update) if stage == 3 else [group]:
                elements = sum(parameter.size for parameter in together)
                largest = max(largest, elements / together[0].group.ranks if stage else elements)
    gradients = _part(parameters) if stage else sum(parameter.size for parameter in parameters)
    return gradients * size.gradients + (UPDATE_COPIES if stage else COMPLETE_UPDATE_COPIES) * largest * FP32


def checkpoint_bytes(config: Config) -> float:
    """Size of a checkpoint: fp32 weights and the running means."""
    alone = held_by_rank(config.model, Layout(ranks=1, ranks_per_node=1))
    return float(sum((1 + _moments(config, parameter)) * FP32 * parameter.size for parameter in alone))


def snapshot_bytes(config: Config, layout: Layout) -> float:
    """Host memory of a rank's part of an asynchronous checkpoint: fp32 weights and the running means."""
    if config.checkpoint.mode != "async":
        return 0.0
    return sum(
        (1 + _moments(config, parameter)) * FP32 * parameter.size / parameter.group.ranks
        for parameter in held_by_rank(config.model, layout)
    )
