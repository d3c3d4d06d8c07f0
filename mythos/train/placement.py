"""Where DeepSpeed keeps the parameters that Muon updates: the attributes of its optimizers that this relies on.

ZeRO-0 hands whole parameters to the optimizer. ZeRO-1 and 2 lay the parameters of a group end to end and give each rank
an equal part of the whole. ZeRO-3 gives each rank an equal part of every parameter, laid end to end, sub-group by
sub-group, and calls the optimizer once for each sub-group.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mythos.train.muon import Held, MuonAdamW

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
