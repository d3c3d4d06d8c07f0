"""Where DeepSpeed keeps parameters and their optimizer state: the attributes of its optimizers that this relies on.

ZeRO-0 hands whole parameters to the optimizer. ZeRO-1 and 2 lay the parameters of a group end to end and give each rank
an equal part of the whole. ZeRO-3 gives each rank an equal part of every parameter, laid end to end, sub-group by
sub-group, and calls the optimizer once for each sub-group.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.engine.muon import Held, MuonAdamW

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
"""State tensors of the shape of their parameter; Muon keeps the first alone."""

Placed = tuple[Tensor, Any, list[Held]]
"""The (first) tensor handed to the optimizer, the ranks among which its parameters are spread, and what is here."""


def placement(
    zero: Any, optimizer: MuonAdamW, stage: int, replicas: Mapping[str, Any], stacked: Mapping[int, int]
) -> Iterator[Placed]:
    """What DeepSpeed hands to the Muon groups of ``optimizer``.

    Args:
        zero: DeepSpeed's optimizer around ``optimizer``, or that one itself.
        replicas: under ZeRO-0, by the group's name ("" without one), the ranks that hold copies of its parameters.
        stacked: by id, how many matrices a parameter stacks along its rows, where that is more than one.
    """
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            if optimizer.param_groups[zero.sub_group_to_group_id[number]]["muon"]:
                process_group = zero.sub_group_process_groups[number]
                held = _in_zero3(parameters, dist.get_rank(process_group), stacked)
                yield zero.fp32_partitioned_groups_flat[number], process_group, held
        return
    for number, group in enumerate(optimizer.param_groups):
        if not group["muon"]:
            continue
        if stage:
            held = [_in_zero12(parameter, stacked) for parameter in zero.bit16_groups[number]]
            yield group["params"][0], zero.real_dp_process_group[number], held
        else:
            parameters = group["params"] if zero is optimizer else zero.fp16_groups[number]
            yield group["params"][0], replicas[group.get("name", "")], _whole(parameters, stacked)


class Whole(NamedTuple):
    """What a parameter of this rank is a part of: with experts spread over ranks, of all experts' weights."""

    name: str
    shape: tuple[int, ...]
    offset: int  # of this rank's first element in the flattened whole
    copy: int  # this rank's number among those that hold the same elements under ZeRO-0
    copies: int


@dataclass(frozen=True)
class Piece:
    """The part of a parameter whose fp32 weights and optimizer state lie on this rank."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # elements of the flattened whole
    stop: int
    share: tuple[int, int]  # those of them that this rank saves: each is saved once over all ranks
    flat: Tensor  # one-dimensional fp32 tensor
    position: int  # of element ``start`` in it
    owner: Tensor  # the tensor in the form that is the key of ``states``
    states: MutableMapping[Tensor, dict[str, Any]]  # of the optimizer

    def weights(self, start: int, stop: int) -> Tensor:
        """A view of the fp32 weights of elements start to stop."""
        return self._view(self.flat, start, stop)

    def optimizer_state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the state tensors of elements start to stop, by name; empty before the first update."""
        state = self.states.get(self.owner, {})
        return {name: self._view(state[name].view(-1), start, stop) for name in OPTIMIZER_STATES if name in state}

    @property
    def steps(self) -> float:
        """Updates that these elements have had."""
        state = self.states.get(self.owner, {})
        return float(state["step"]) if state else 0.0

    def set_optimizer_state(self, values: Mapping[str, Tensor], steps: float) -> None:
        """Put saved values of all elements in place, and the number of updates; ``states`` was emptied before."""
        if not steps:
            return
        state = self.states[self.owner]
        # A tensor of its own for every owner: the optimizer counts up in place.
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=self.owner.device)
        for name, value in values.items():
            if name not in state:
                state[name] = torch.zeros_like(self.owner, requires_grad=False)
            self._view(state[name].view(-1), self.start, self.stop).copy_(value)

    def _view(self, flat: Tensor, start: int, stop: int) -> Tensor:
        return flat[self.position + start - self.start : self.position + stop - self.start]


def pieces(zero: Any, optimizer: torch.optim.Optimizer, stage: int, whole: Callable[[Any], Whole]) -> Iterator[Piece]:
    """Everything that ``optimizer`` updates on this rank.

    Args:
        zero: DeepSpeed's optimizer around ``optimizer``, or that one itself.
        whole: says what one of the model's parameters is a part of.
    """
    for parameter, part, owner in _updated(zero, optimizer, stage):
        about = whole(parameter)
        count = part.stop - part.start
        first, last = (
            (0, count) if stage else (number * count // about.copies for number in (about.copy, about.copy + 1))
        )
        start = about.offset + part.start
        flat = owner.detach().view(-1)
        if count:
            yield Piece(
                name=about.name,
                shape=about.shape,
                start=start,
                stop=start + count,
                share=(start + first, start + last),
                flat=flat,
                position=part.position,
                owner=owner,
                states=optimizer.state,
            )


def _updated(zero: Any, optimizer: Any, stage: int) -> Iterator[tuple[Any, Held, Tensor]]:
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            held = _in_zero3(parameters, dist.get_rank(zero.sub_group_process_groups[number]), {})
            for parameter, part in zip(parameters, held, strict=True):
                yield parameter, part, zero.fp32_partitioned_groups_flat[number]
        return
    for number, group in enumerate(optimizer.param_groups):
        if stage:
            for parameter in zero.bit16_groups[number]:
                yield parameter, _in_zero12(parameter, {}), group["params"][0]
        else:
            parameters = group["params"] if zero is optimizer else zero.fp16_groups[number]
            for parameter, owner in zip(parameters, group["params"], strict=True):
                yield parameter, Held(parameter.shape, 1, 0, parameter.numel(), 0), owner


def refresh_weights(zero: Any, optimizer: Any, stage: int) -> None:
    """Give the model the fp32 weights, rounded to its type, as an update does. Collective."""
    if stage == 3:
        zero.checkpoint_event_prologue()
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            rounded = zero.fp16_partitioned_groups_flat[number]
            rounded.data.copy_(flat.data)
            parts = zero.fp16_partitioned_groups[number]
            for part, view in zip(parts, zero.unflatten(rounded, parts), strict=True):
                part.data = view.data
        zero.checkpoint_event_epilogue()  # small parameters, that every rank keeps whole, are gathered anew
    elif stage:
        zero.update_lp_params()
    elif zero is not optimizer:
        for parameters, group in zip(zero.fp16_groups, optimizer.param_groups, strict=True):
            for parameter, owner in zip(parameters, group["params"], strict=True):
                parameter.data.copy_(owner.data)


def _whole(parameters: list[Tensor], stacked: Mapping[int, int]) -> list[Held]:
    held, position = [], 0
    for parameter in parameters:
        held.append(Held(parameter.shape, stacked.get(id(parameter), 1), 0, parameter.numel(), position))
        position += parameter.numel()
    return held


def _in_zero12(parameter: Any, stacked: Mapping[int, int]) -> Held:
    parts = stacked.get(id(parameter), 1)
    if parameter._hp_mapping is None:  # all of it lies on other ranks
        return Held(parameter.shape, parts, 0, 0, 0)
    here, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
    return Held(parameter.shape, parts, here.start, here.start + here.numel, flat.start)


def _in_zero3(parameters: list[Any], rank: int, stacked: Mapping[int, int]) -> list[Held]:
    held, position = [], 0
    for parameter in parameters:
        length, whole = parameter.partition_numel(), parameter.ds_numel  # the last part may be padded
        start, stop = min(rank * length, whole), min((rank + 1) * length, whole)
        held.append(Held(parameter.ds_shape, stacked.get(id(parameter), 1), start, stop, position))
        position += length
    return held
