"""The part of the configuration tree that describes how often the core of a looped model is run."""

from typing import Literal

from mythos.config.option import Needs, option, section

PER_SEQUENCE = Needs("loop.depth", ("poisson_per_sequence", "log_normal_poisson_per_sequence"))


@section
class Loop:
    """How often the core is run; for looped models only."""

    mean_depth: float = option(
        "mean number of loop steps in training; the number itself when depth is fixed",
        8.0,
        ge=1,
        le=10_000,
        change="ask",
    )
    depth: Literal["fixed", "poisson_per_batch", "poisson_per_sequence", "log_normal_poisson_per_sequence"] = option(
        "how depths are drawn in training; every draw is at least 1", "poisson_per_sequence", change="ask"
    )
    log_normal_sigma: float = option(
        "spread of the log-normal rate",
        0.5,
        gt=0,
        le=5,
        change="ask",
        needs=Needs("loop.depth", ("log_normal_poisson_per_sequence",)),
    )
    stratified: bool = option(
        "draw the sequences' depths as evenly spread quantiles: every micro batch then costs nearly the same",
        True,
        change="ask",
        needs=PER_SEQUENCE,
    )
    curriculum_steps: int = option(
        "steps over which the mean depth rises linearly from 1 to mean_depth", 0, ge=0, change="ask"
    )
    backprop_depth: int = option("the last min(depth, this) loop steps carry gradient", 4, gt=0, change="ask")
    recompute: Literal["auto", True, False] = option(
        "recompute each loop step in the backward pass instead of keeping its activations: slower, with less memory; "
        "auto: only where the activations do not fit, by the plan and the smallest device of all ranks",
        "auto",
        change="free",
    )
