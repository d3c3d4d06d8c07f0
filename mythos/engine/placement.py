"""Where DeepSpeed keeps parameters and their optimizer state: every attribute of its optimizers that Mythos reads.

ZeRO-0 passes complete parameters to the optimizer. ZeRO-1 and 2 concatenate the parameters of a group and give each
rank an equal part of the result. ZeRO-3 gives each rank an equal part of every parameter, concatenates these parts
within a sub-group, and calls the optimizer once for each sub-group.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.engine.exchange import FlatSlice
from mythos.engine.muon import MuonAdamW
from mythos.plan.moments import SECOND_MOMENT, moments_before

ADAMW_STATES = ("exp_avg", "exp_avg_sq")
"""State tensors of the shape of their parameter."""

Placement = tuple[Tensor, Any, list[FlatSlice]]
"""The (first) tensor passed to the optimizer, the ranks over which its parameters are spread, this rank's elements."""


def muon_placements(
    zero: Any, optimizer: MuonAdamW, stage: int, replicas: Mapping[str, Any], stacked: Mapping[Tensor, int]
) -> Iterator[Placement]:
    """The tensors that DeepSpeed passes to the Muon groups of ``optimizer``.

    Args:
        zero: DeepSpeed's wrapper of ``optimizer``, or ``optimizer`` itself.
        replicas: under ZeRO-0, by the group's name ("" without one), the ranks that have copies of its parameters.
        stacked: how many matrices a parameter stacks along its rows, where that is more than one.
    """
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            if optimizer.param_groups[zero.sub_group_to_group_id[number]]["muon"]:
                process_group = zero.sub_group_process_groups[number]
                slices = _zero3_slices(parameters, dist.get_rank(process_group), stacked)
                yield zero.fp32_partitioned_groups_flat[number], process_group, slices
        return
    for number, group in enumerate(optimizer.param_groups):
        if not group["muon"]:
            continue
        if stage:
            slices = [_zero12_slice(parameter, stacked) for parameter in zero.bit16_groups[number]]
            yield group["params"][0], zero.real_dp_process_group[number], slices
        else:
            yield group["params"][0], replicas[group.get("name", "")], _complete_slices(group["params"], stacked)


class GlobalParameter(NamedTuple):
    """The parameter over all ranks to which a rank's parameter belongs: with the experts of all ranks."""

    name: str
    shape: tuple[int, ...]
    offset: int  # of this rank's first element in the flattened global parameter
    replica: int  # this rank's number among those that have the same elements under ZeRO-0
    replicas: int


class MomentsPlace(NamedTuple):
    """Where the second moments of a shard are in the state tensor of its owner."""

    matrix: tuple[int, int]  # rows and columns of the matrices that have them
    position: int  # of the shard's first one
    total: int  # in the state tensor


@dataclass(frozen=True)
class ParameterShard:
    """The part of a parameter whose fp32 weights and optimizer state are on this rank."""

    name: str
    shape: tuple[int, ...]  # of the global parameter
    start: int  # elements of the flattened global parameter
    stop: int
    share: tuple[int, int]  # the elements that this rank saves: each element is saved by exactly one rank
    flat: Tensor  # one-dimensional fp32 tensor
    position: int  # of element ``start`` in it
    owner: Tensor  # the tensor that is the key of ``states``
    states: MutableMapping[Tensor, dict[str, Any]]  # of the optimizer
    state_names: tuple[str, ...]  # the state tensors that the optimizer uses for this parameter
    moments: MomentsPlace | None = None  # if they include second moments

    def weights(self, start: int, stop: int) -> Tensor:
        """A view of the fp32 weights of elements start to stop."""
        return self._view(self.flat, start, stop)

    def optimizer_state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the state tensors of elements start to stop, by name; empty before the first update."""
        state = self.states.get(self.owner, {})
        return {name: self._view_of(name, state[name], start, stop) for name in self.state_names if name in state}

    @property
    def steps(self) -> float:
        """Number of updates of these elements."""
        state = self.states.get(self.owner, {})
        return float(state["step"]) if state else 0.0

    def set_optimizer_state(self, values: Mapping[str, Tensor], steps: float) -> None:
        """Restore the saved values of all elements and the number of updates; ``states`` must have been cleared.

        The checkpoint of a run with another ``optim.kind`` may have more or fewer state tensors. Those that are not
        used are dropped. A missing ``exp_avg_sq`` (AdamW after Muon) starts at the square of ``exp_avg``, so that the
        first update is at most about one learning rate; at zero it would be several times that. Missing second moments
        start at zero, as in a new run.
        """
        if not steps:
            return
        state = self.states[self.owner]
        # Every owner needs a tensor of its own, because the optimizer increments it in place.
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=self.owner.device)
        for name in self.state_names:
            if name not in state:
                state[name] = self._empty(name)
            view = self._view_of(name, state[name], self.start, self.stop)
            if name in values:
                view.copy_(values[name])
            elif name == "exp_avg_sq":
                view.copy_(values["exp_avg"].square())

    def _empty(self, name: str) -> Tensor:
        """A state tensor as it is before the first update."""
        if name != SECOND_MOMENT or self.moments is None:
            return torch.zeros_like(self.owner, requires_grad=False)
        return torch.zeros(self.moments.total, device=self.owner.device)

    def _view_of(self, name: str, state: Tensor, start: int, stop: int) -> Tensor:
        if name != SECOND_MOMENT or self.moments is None:
            return self._view(state.view(-1), start, stop)
        matrix, position, _ = self.moments
        before = position - moments_before(matrix, self.start)
        return state[before + moments_before(matrix, start) : before + moments_before(matrix, stop)]

    def _view(self, flat: Tensor, start: int, stop: int) -> Tensor:
        return flat[self.position + start - self.start : self.position + stop - self.start]


def parameter_shards(
    zero: Any,
    optimizer: torch.optim.Optimizer,
    stage: int,
    stacked: Mapping[Tensor, int],
    global_parameter: Callable[[Any], GlobalParameter],
) -> Iterator[ParameterShard]:
    """Everything that ``optimizer`` updates on this rank.

    Args:
        zero: DeepSpeed's wrapper of ``optimizer``, or ``optimizer`` itself.
        stacked: how many matrices a parameter stacks along its rows, where that is more than one.
        global_parameter: maps a parameter of this rank's model to the global one.
    """
    updated = list(_updated(zero, optimizer, stage, stacked))
    for (parameter, part, owner, group), moments in zip(updated, _moments_places(updated), strict=True):
        of = global_parameter(parameter)
        count = part.stop - part.start
        first, last = (
            (0, count) if stage else (number * count // of.replicas for number in (of.replica, of.replica + 1))
        )
        start = of.offset + part.start
        flat = owner.detach().view(-1)
        if count:
            yield ParameterShard(
                name=of.name,
                shape=of.shape,
                start=start,
                stop=start + count,
                share=(start + first, start + last),
                flat=flat,
                position=part.position,
                owner=owner,
                states=optimizer.state,
                state_names=_state_names(group),
                moments=moments,
            )


def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The state tensors that the optimizer has for the parameters of a group."""
    if not group.get("muon"):
        return ADAMW_STATES
    return ("exp_avg", SECOND_MOMENT) if group["beta2"] else ("exp_avg",)


Updated = tuple[Any, FlatSlice, Tensor, dict[str, Any]]
"""Parameter of the model, its elements on this rank, the tensor passed to the optimizer, its group."""


def _moments_places(updated: Sequence[Updated]) -> list[MomentsPlace | None]:
    """Where the second moments of each parameter are; None for those that have none."""
    totals: dict[Tensor, int] = {}
    positions: list[int | None] = []
    for _, part, owner, group in updated:
        has_moments = SECOND_MOMENT in _state_names(group)
        positions.append(totals.get(owner, 0) if has_moments else None)
        if has_moments:
            totals[owner] = totals.get(owner, 0) + part.moments
    return [
        None if position is None else MomentsPlace(part.matrix, position, totals[owner])
        for position, (_, part, owner, _) in zip(positions, updated, strict=True)
    ]


def _updated(zero: Any, optimizer: Any, stage: int, stacked: Mapping[Tensor, int]) -> Iterator[Updated]:
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            slices = _zero3_slices(parameters, dist.get_rank(zero.sub_group_process_groups[number]), stacked)
            group = optimizer.param_groups[zero.sub_group_to_group_id[number]]
            for parameter, part in zip(parameters, slices, strict=True):
                yield parameter, part, zero.fp32_partitioned_groups_flat[number], group
        return
    for number, group in enumerate(optimizer.param_groups):
        if stage:
            for parameter in zero.bit16_groups[number]:
                yield parameter, _zero12_slice(parameter, stacked), group["params"][0], group
        else:
            for parameter in group["params"]:
                whole = FlatSlice(parameter.shape, stacked.get(parameter, 1), 0, parameter.numel(), 0)
                yield parameter, whole, parameter, group


def refresh_weights(zero: Any, stage: int) -> None:
    """Copy the weights of the ``shards`` to where the model has them, as an update does. Collective."""
    if stage == 3:
        zero.checkpoint_event_prologue()
        for flat, parts in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
            for part, view in zip(parts, zero.unflatten(flat, parts), strict=True):
                part.data = view.data
        zero.checkpoint_event_epilogue()  # gathers the small parameters, which every rank keeps completely
    elif stage:
        zero.update_lp_params()


def _complete_slices(parameters: list[Tensor], stacked: Mapping[Tensor, int]) -> list[FlatSlice]:
    slices, position = [], 0
    for parameter in parameters:
        slices.append(FlatSlice(parameter.shape, stacked.get(parameter, 1), 0, parameter.numel(), position))
        position += parameter.numel()
    return slices


def _zero12_slice(parameter: Any, stacked: Mapping[Tensor, int]) -> FlatSlice:
    matrices = stacked.get(parameter, 1)
    if parameter._hp_mapping is None:  # all of its elements are on other ranks
        return FlatSlice(parameter.shape, matrices, 0, 0, 0)
    here, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
    return FlatSlice(parameter.shape, matrices, here.start, here.start + here.numel, flat.start)


def _zero3_slices(parameters: list[Any], rank: int, stacked: Mapping[Tensor, int]) -> list[FlatSlice]:
    slices, position = [], 0
    for parameter in parameters:
        length, total = parameter.partition_numel(), parameter.ds_numel  # the last part may be padded
        start, stop = min(rank * length, total), min((rank + 1) * length, total)
        slices.append(FlatSlice(parameter.ds_shape, stacked.get(parameter, 1), start, stop, position))
        position += length
    return slices
