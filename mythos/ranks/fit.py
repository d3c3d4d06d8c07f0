"""Whether a run fits the devices that its ranks have found, by its plan."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mythos.config.schema import Config
from mythos.plan.cluster import cluster_of_device
from mythos.plan.plan import Plan, make_plan
from mythos.plan.report import binary
from mythos.run.console import log
from mythos.run.planned import write_plan


def plan_run(config: Config, hosts: Sequence[str], device: torch.device) -> None:
    """Write the plan of this attempt into the run directory, and warn if it does not fit. On rank 0 only."""
    plan = plan_of_ranks(config, hosts, device)
    if plan is None:
        return
    write_plan(Path(config.run.directory), plan)
    if warning := memory_warning(plan):
        log.warning(warning)
    elif plan.recomputes_in_vain:
        log.info("the activations fit without recomputation: loop.recompute=false would be faster")


def plan_of_ranks(config: Config, hosts: Sequence[str], device: torch.device) -> Plan | None:
    """The plan of a run on devices like this one; None if no file in configs/cluster has the device's figures.

    Args:
        hosts: the host of each rank.
    """
    per_node = max(hosts.count(host) for host in set(hosts))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, float(properties.total_memory)
    else:
        name = device.type
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
    cluster = cluster_of_device(name, memory_bytes, per_node)
    return None if cluster is None else make_plan(config, len(hosts), cluster)


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
