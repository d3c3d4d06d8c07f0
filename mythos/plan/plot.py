"""A picture of step time and price against the number of GPUs and the expert-parallel size."""

from collections.abc import Sequence
from pathlib import Path

from mythos.drawing import new_figure, png
from mythos.errors import os_errors_as_user_errors
from mythos.files import write_atomically
from mythos.plan.plan import Plan


def plot(by_gpus: Sequence[Plan], by_expert_size: Sequence[Plan], path: Path) -> None:
    """Write the picture. Raises UserError if it cannot be written."""
    rows = [(by_gpus, "GPUs", [plan.layout.ranks for plan in by_gpus])]
    if by_expert_size:
        sizes = [plan.layout.expert_parallel_size for plan in by_expert_size]
        rows.append((by_expert_size, "expert-parallel size", sizes))
    figure, axes = new_figure(2, len(rows), width=5, height=3.6)
    for (plans, label, x), (time, price) in zip(rows, axes, strict=True):
        for name, of_plan in (
            ("step", lambda plan: plan.time.total),
            ("computation", lambda plan: plan.time.compute),
            ("exposed communication", lambda plan: plan.time.exposed),
        ):
            time.plot(x, [of_plan(plan) for plan in plans], marker="o", label=name)
        price.plot(x, [plan.cost.dollars for plan in plans], marker="o", label="whole run")
        for axis, title in ((time, "seconds of a step"), (price, "dollars")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x])
            axis.set_xlabel(label)
            axis.set_ylabel(title)
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.grid(alpha=0.3)
            for place, plan in zip(x, plans, strict=True):
                if not plan.fits:
                    axis.axvspan(place / 1.1, place * 1.1, color="tab:red", alpha=0.15)
        time.legend()
    first = by_gpus[0]
    figure.suptitle(f"{first.cluster.name}, ZeRO {first.config.parallel.zero_stage}; red: does not fit")
    with os_errors_as_user_errors(path, "choose another file"):
        write_atomically(path, png(figure))
