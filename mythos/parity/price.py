"""What the training that is missing of an experiment costs on a cluster, by the planner, without evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos.parity.experiment import Experiment, planned_runs
from mythos.parity.runs import Progress, progress
from mythos.plan.cluster import Cluster
from mythos.plan.plan import make_plan

HOURS_PER_DAY = 24


@dataclass(frozen=True)
class ArmPrice:
    """Of the runs of an arm whose training is not finished, for the steps that remain."""

    arm: str
    runs: int
    steps: int
    """Of a complete run."""
    days: float
    """Of a complete run."""
    gpu_hours: float
    """Of all nodes of a job, also of those that stay idle."""
    dollars: float
    nodes: int
    """That a run uses."""
    problem: str
    """Why a run does not fit on the cluster; empty if it does."""


def prices(experiment: Experiment, cluster: Cluster, nodes: int) -> list[ArmPrice]:
    """The price of each arm that is not trained, with so many nodes for each job.

    As by `mythos job`, a run uses as many of them as its global batch can be divided over.

    Raises:
        UserError: an arm's configuration is valid for no number of nodes up to this one.
    """
    per_node = cluster.gpus_per_node
    by_arm: dict[str, list[Progress]] = {}
    for run in planned_runs(experiment, range(nodes * per_node, 0, -per_node)):
        if (found := progress(experiment, run)).need == "training":
            by_arm.setdefault(run.arm, []).append(found)
    return [_price(arm, missing, cluster, nodes) for arm, missing in by_arm.items()]


def _price(arm: str, missing: Sequence[Progress], cluster: Cluster, nodes: int) -> ArmPrice:
    config, ranks = missing[0].run.config, missing[0].run.processes
    plan = make_plan(config, ranks, cluster)
    used = ranks // cluster.gpus_per_node
    remaining = sum(1 - (each.status.step if each.status else 0) / config.train.steps for each in missing)
    return ArmPrice(
        arm,
        len(missing),
        config.train.steps,
        plan.cost.days,
        remaining * plan.cost.gpu_hours * nodes / used,
        remaining * plan.cost.dollars * nodes / used,
        used,
        "" if plan.fits else f"does not fit: {plan.limit}",
    )
