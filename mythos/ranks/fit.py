"""Whether a run fits the devices that its ranks have found, by its plan."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mythos.config.schema import Config
from mythos.plan.cluster import Cluster, cluster_of_device
from mythos.plan.layout import layout_of
from mythos.plan.memory import recomputes
from mythos.plan.plan import Plan, make_plan
from mythos.plan.report import binary
from mythos.ranks import group
from mythos.run.console import log
from mythos.run.planned import write_plan


@dataclass(frozen=True)
class Device:
    """Its name, as PyTorch gives it, or ``cpu``, and its memory; a CPU's is that of the host."""

    name: str
    memory_bytes: int


def device_of_each_rank(device: torch.device) -> list[Device]:
    """The devices of all ranks, the same list on all of them. Collective."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return group.gather_objects(Device(properties.name, properties.total_memory))
    return group.gather_objects(Device(device.type, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def plan_run(config: Config, hosts: Sequence[str], devices: Sequence[Device]) -> None:
    """Write the plan of this attempt into the run directory, and warn if it does not fit. On rank 0 only."""
    plan = plan_of_ranks(config, hosts, devices)
    if plan is None:
        if config.loop is not None and config.loop.recompute == "auto":
            log.info(
                f"loop.recompute=auto: no file in configs/cluster has {devices[0].name}: loop steps are recomputed; "
                "loop.recompute=false is faster where the activations fit"
            )
        return
    write_plan(Path(config.run.directory), plan)
    if choice := recomputation_choice(plan):
        log.info(choice)
    if warning := memory_warning(plan):
        log.warning(warning)
    elif plan.recomputes_in_vain:
        log.info("the activations fit without recomputation: loop.recompute=auto (or false) would be faster")


def plan_of_ranks(config: Config, hosts: Sequence[str], devices: Sequence[Device]) -> Plan | None:
    """The plan of a run on the smallest of these devices; None if no file in configs/cluster has their figures.

    Args:
        hosts: the host of each rank.
        devices: the device of each rank.
    """
    cluster = _smallest(hosts, devices)
    return None if cluster is None else make_plan(config, len(hosts), cluster)


def recomputes_on(config: Config, hosts: Sequence[str], devices: Sequence[Device]) -> bool:
    """Whether these ranks recompute loop steps. All must do the same: recomputation exchanges tokens with experts."""
    cluster = _smallest(hosts, devices)
    if cluster is None:  # how much of the memory can be used is not known
        return config.loop is not None and config.loop.recompute is not False
    layout = layout_of(config, len(hosts), cluster.gpus_per_node)
    return recomputes(config, layout, cluster.is_gpu, cluster.usable_bytes)


def _smallest(hosts: Sequence[str], devices: Sequence[Device]) -> Cluster | None:
    per_node = max(hosts.count(host) for host in set(hosts))
    least = min(device.memory_bytes for device in devices)
    name = devices[0].name
    return cluster_of_device(name, least / per_node if name == "cpu" else float(least), per_node)


def recomputation_choice(plan: Plan) -> str | None:
    """One line on what ``loop.recompute: auto`` has chosen; None where the configuration says it."""
    if plan.config.loop is None or plan.config.loop.recompute != "auto":
        return None
    needed, usable = binary(plan.peak_without_recomputation), binary(plan.cluster.usable_bytes)
    choice = "loop steps are recomputed" if plan.recompute else "nothing is recomputed"
    return f"loop.recompute=auto: {choice}: without recomputation a rank needs about {needed} of its {usable}"


def memory_warning(plan: Plan) -> str | None:
    """One line if the plan does not fit."""
    if plan.fits:
        return None
    if plan.limit == "host memory":
        return (
            f"the asynchronous save needs {binary(plan.host_bytes)} of memory on each node, more than the plan's "
            f"{plan.cluster.host_memory_gib:.3g} GiB: set checkpoint.mode=sync, or use more nodes"
        )
    remedies = ["train.micro_batch_sequences"] if plan.config.train.micro_batch_sequences > 1 else []
    remedies += ["loop.recompute=true"] if plan.config.loop is not None and not plan.recompute else []
    remedies += ["parallel.zero_stage=3"] if plan.config.parallel.zero_stage < 3 else []
    smaller = [f"a smaller {name}" if "=" not in name else name for name in remedies]
    needed, usable = binary(plan.memory.peak), binary(plan.cluster.usable_bytes)
    return (
        f"this run needs about {needed} on each device, which has {usable} for it: "
        f"try {', '.join([*smaller, 'more ranks'])}; `mythos plan --search` lists what fits"
    )
