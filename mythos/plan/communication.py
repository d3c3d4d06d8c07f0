"""What the ranks exchange in one optimizer step: the calls of collectives, and the bytes of each.

The counts are those of DeepSpeed 0.19 once it knows the order of the modules (from the third micro-step on).

    ZeRO 0     all-reduce of the gradients, once a step
    ZeRO 1     all-reduce of the gradients, once a step; all-gather of the updated weights
    ZeRO 2     all-reduce of the gradients, once a micro-step; all-gather of the updated weights
    ZeRO 3     all-gathers of the weights and reduce-scatters of the gradients, once a micro-step or more
    experts    for each layer and loop step three all-to-alls forward (counts, tokens, results), two backward,
               three more where the loop step is recomputed
    Muon       two all-to-alls for the matrices of each flat tensor that DeepSpeed passes to it; one under ZeRO 0
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal

from mythos.config.derive import micro_steps
from mythos.config.model_schema import Looped
from mythos.config.optim_schema import Muon
from mythos.config.schema import Config
from mythos.plan.gathers import DEEPSPEED, Limits, leaf_of, micro_step
from mythos.plan.layout import Group, Held, Layout, held_by_rank
from mythos.plan.precision import Bytes
from mythos.plan.tensors import Treatment

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

ALIGNMENT = 2
"""ZeRO 1 and 2 pad a flat group of parameters to a multiple of this times the ranks."""
COUNTS_BYTES = 4
"""int32: how many tokens a rank sends to each expert."""


@dataclass(frozen=True)
class Collective:
    """The calls for one purpose in one optimizer step.

    ``bytes`` are those of all calls together, on one rank, on average over the ranks: of the gathered tensor, of the
    tensor before it is reduced, or of what the rank sends to all, itself included.
    """

    purpose: str
    kind: Kind
    group: Group
    calls: float
    bytes: float
    waited: bool = True
    """The computation needs the result at once."""


@dataclass(frozen=True)
class Loops:
    """Loop steps of one micro-step: executed, which is those of its deepest sequence; and the mean over sequences."""

    executed: float
    executed_with_grad: float
    mean: float
    mean_with_grad: float


def collectives(
    config: Config, layout: Layout, width: Bytes, loops: Loops, recompute: bool, limits: Limits = DEEPSPEED
) -> list[Collective]:
    """Everything that the engine exchanges in one optimizer step, apart from gradient norms of a few bytes."""
    parameters, micro = held_by_rank(config.model, layout), micro_steps(config, layout.ranks)
    stage = config.parallel.zero_stage
    if stage == 3:
        found = _zero_3(config, layout, micro, width, limits)
    else:
        found = _zero_0_to_2(config, parameters, micro if stage == 2 else 1, width, limits)
    found += [*_experts(config, layout, micro, width, loops, recompute), *_muon(config, parameters, width, limits)]
    return [each for each in found if each.group.ranks > 1 and each.calls]


def _zero_3(config: Config, layout: Layout, micro: int, width: Bytes, limits: Limits) -> list[Collective]:
    kept = config.parallel.persistent_parameter_elements
    parameters = held_by_rank(config.model, layout)
    gathered = micro_step(config.model, layout, kept, limits)
    always = [parameter for parameter in parameters if parameter.size <= kept]
    found = []
    for fetches, size, times, waited in (
        (gathered.waited, width.gathered_as, micro, True),
        (gathered.prefetched, width.gathered_as, micro, False),
        ([always], lambda _: width.weights, 1, True),
    ):
        calls = [call for together in fetches for call in _alike(together, size)]
        found += _sum("weights", "all_gather", calls, size, times, waited)
    reduced = reduce_buckets(config, parameters, limits.reduce)
    return found + _sum("gradients", "reduce_scatter", reduced, lambda _: width.reduced, micro, False)


_GroupKey = tuple[Group, Treatment | None]


def _group_key(parameter: Held) -> _GroupKey:
    """DeepSpeed's process group under ZeRO 3: routers and experts have their own, even where the ranks are the same."""
    separate = parameter.treatment in (Treatment.ROUTER, Treatment.EXPERT)
    return parameter.group, parameter.treatment if separate else None


def _alike(parameters: Iterable[Held], size: Callable[[Held], int]) -> Iterable[list[Held]]:
    """The parameters that one call gathers: of one process group and one type."""
    found: dict[tuple[_GroupKey, int], list[Held]] = {}
    for parameter in parameters:
        found.setdefault((_group_key(parameter), size(parameter)), []).append(parameter)
    return found.values()


def _sum(
    purpose: str,
    kind: Kind,
    calls: Iterable[Sequence[Held]],
    size: Callable[[Held], int],
    times: int,
    waited: bool,
) -> list[Collective]:
    """The collectives of all calls by group; ``size`` is the bytes of a parameter's padded elements."""
    count: Counter[Group] = Counter()
    total: Counter[Group] = Counter()
    for parameters in calls:
        group = parameters[0].group
        count[group] += times
        total[group] += times * sum(parameter.padded * size(parameter) for parameter in parameters)
    return [Collective(purpose, kind, group, count[group], total[group], waited) for group in count]


def reduce_buckets(config: Config, parameters: Sequence[Held], largest: int) -> list[list[Held]]:
    """The gradients that ZeRO 3 reduces together, in the order in which the backward pass produces them.

    A bucket ends where the next gradient belongs to another process group, or would make it larger than ``largest``.
    """
    in_order = _gradients_in_order(config, parameters)
    return [bucket for _, same in groupby(in_order, key=_group_key) for bucket in _filled(same, largest)]


def optimizer_groups(config: Config, parameters: Sequence[Held]) -> list[list[Held]]:
    """The parameter groups in their order: those of the optimizer; under ZeRO 3 routers are apart, after theirs."""
    routers, experts = {Treatment.ROUTER}, {Treatment.EXPERT}
    if isinstance(config.optim, Muon):
        groups = [{Treatment.OTHER, Treatment.OUTER_MATRIX}, routers, {Treatment.MATRIX}, experts]
    else:
        groups = [{Treatment.MATRIX, Treatment.OUTER_MATRIX}, routers, {Treatment.OTHER}, experts]
    if config.parallel.zero_stage < 3:
        groups = [groups[0] | routers, *groups[2:]]
    ordered = [[parameter for parameter in parameters if parameter.treatment in group] for group in groups]
    return [group for group in ordered if group]


def _gradients_in_order(config: Config, parameters: Sequence[Held]) -> Iterator[Held]:
    """Backward through the modules; a leaf's gradients are complete together, and come in the optimizer's order."""
    leaves: dict[str, list[Held]] = {}
    for parameter in parameters:
        leaves.setdefault(leaf_of(parameter.name) or parameter.name, []).append(parameter)
    loop = leaves.pop("loop", [])
    for name, own in reversed(leaves.items()):
        if name == "prelude_norm.weight":
            yield from chain(*optimizer_groups(config, loop))
        yield from chain(*optimizer_groups(config, own))


def _zero_0_to_2(
    config: Config, parameters: Sequence[Held], times: int, width: Bytes, limits: Limits
) -> list[Collective]:
    # ZeRO 2 reduces gradients as the backward pass produces them, ZeRO 1 all at the end, group by group. Dense
    # parameters and experts fill the same buckets, whose parts are reduced by different ranks.
    groups = optimizer_groups(config, parameters)
    in_order = chain(*groups) if config.parallel.zero_stage == 1 else reversed(parameters)
    buckets = _filled(in_order, limits.reduce)
    reduced = [_by_owner(bucket) for bucket in buckets]
    found: list[Collective] = []
    for key in dict.fromkeys(key for bucket in reduced for key in bucket):
        parts = [bucket[key] for bucket in reduced if key in bucket]
        size = sum(parameter.size for part in parts for parameter in part) * width.reduced
        found.append(Collective("gradients", "all_reduce", parts[0][0].group, len(parts) * times, size * times, False))
    for own in groups if config.parallel.zero_stage else ():
        size = flat_elements(own) * width.weights
        found.append(Collective("weights", "all_gather", own[0].group, 1, size))
    return found


def _by_owner(parameters: Iterable[Held]) -> dict[bool, list[Held]]:
    """Dense parameters (False) and experts (True)."""
    found: dict[bool, list[Held]] = {}
    for parameter in parameters:
        found.setdefault(parameter.treatment is Treatment.EXPERT, []).append(parameter)
    return found


def _filled(parameters: Iterable[Held], largest: int) -> list[list[Held]]:
    """The parameters in buckets of at most ``largest`` elements; a larger parameter has one of its own."""
    buckets: list[list[Held]] = []
    elements: float = math.inf
    for parameter in parameters:
        if elements + parameter.size > largest:
            buckets.append([])
            elements = 0
        buckets[-1].append(parameter)
        elements += parameter.size
    return buckets


def flat_elements(parameters: Sequence[Held]) -> int:
    """Elements of the flat tensor of a parameter group under ZeRO 1 and 2, with padding."""
    unit = ALIGNMENT * parameters[0].group.ranks
    return -(-sum(parameter.size for parameter in parameters) // unit) * unit


def _experts(
    config: Config, layout: Layout, micro: int, width: Bytes, loops: Loops, recompute: bool
) -> Iterator[Collective]:
    if not isinstance(config.model, Looped) or config.model.core_experts is None or config.loop is None:
        return
    model, experts = config.model, config.model.core_experts
    tokens = config.train.micro_batch_sequences * config.data.sequence_length
    rows = micro * model.core_layers * tokens * experts.experts_per_token * model.width * width.products
    layers = micro * model.core_layers
    group = layout.sharing
    forward = loops.executed + recompute * loops.executed_with_grad
    mean_forward = loops.mean + recompute * loops.mean_with_grad
    calls = layers * forward
    yield Collective("expert counts", "all_to_all", group, calls, calls * experts.experts * COUNTS_BYTES)
    yield Collective("experts forward", "all_to_all", group, 2 * calls, 2 * rows * mean_forward)
    backward = 2 * layers * loops.executed_with_grad
    yield Collective("experts backward", "all_to_all", group, backward, 2 * rows * loops.mean_with_grad)


def _muon(config: Config, parameters: Sequence[Held], width: Bytes, limits: Limits) -> Iterator[Collective]:
    if not isinstance(config.optim, Muon):
        return
    stage = config.parallel.zero_stage
    for own in optimizer_groups(config, parameters):
        if own[0].treatment not in (Treatment.MATRIX, Treatment.EXPERT):
            continue
        group, elements = own[0].group, sum(parameter.size for parameter in own)
        flat = len(sub_groups(own, limits.update)) if stage == 3 else 1
        # To the owner of each matrix a rank sends its part, and gets it back; under ZeRO 0 all get the whole result.
        sent = elements if stage == 0 else 2 * elements / group.ranks
        calls = flat * (1 if stage == 0 else 2)
        yield Collective("Muon", "all_to_all", group, calls, sent * width.products)


def sub_groups(parameters: Sequence[Held], largest: int) -> list[list[Held]]:
    """The parts of a parameter group that ZeRO 3 updates one after the other, of about ``largest`` elements a rank."""
    parts: list[list[Held]] = []
    elements = largest
    for parameter in parameters:
        if elements >= largest:
            parts.append([])
            elements = 0
        parts[-1].append(parameter)
        elements += parameter.padded // parameter.group.ranks
    return parts
