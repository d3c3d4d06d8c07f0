"""Hyperparameters of every update: learning rates, momentum and weight decay as functions of the step."""

import math
from typing import NamedTuple

from mythos.config.optim_schema import AdamW, Muon, Optim

MATRICES, EXPERTS, OTHERS = "matrices", "experts", "others"
"""Names of the parameter groups (``group["role"]``): the optimizer's builder and ``schedule`` agree on them."""


RATE_TOLERANCE = 0.01


def schedule(config: Optim, step: int, steps: int) -> dict[str, dict[str, float]]:
    """What changes in each parameter group at update number ``step`` (from 0) out of ``steps``, by the group's name.

    AdamW's groups get a learning rate. Muon's get a learning rate of the same form; a momentum, which rises linearly
    during its warm-up and is constant afterwards; and a weight decay, which falls linearly to 0 at the last step, or as
    the learning rate does.
    """
    adamw = {"lr": learning_rate(config, step, steps)}
    match config:
        case AdamW():
            return {MATRICES: adamw, EXPERTS: adamw, OTHERS: adamw}
        case Muon():
            warm = min(1.0, step / config.muon_momentum_warmup_steps) if config.muon_momentum_warmup_steps else 1.0
            muon = {
                "lr": _scheduled(config.muon_learning_rate, config, step, steps),
                "momentum": (1 - warm) * config.muon_momentum_start + warm * config.muon_momentum,
                "weight_decay": config.muon_weight_decay * _muon_decay(config, step, steps),
            }
            return {MATRICES: muon, EXPERTS: muon, OTHERS: adamw}


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """AdamW's learning rate at update number ``step`` (from 0) out of ``steps``: the one that is reported.

    Linear warm-up from 0 to the peak, constant, then the cooldown over the last ``cooldown_fraction`` of the steps.
    """
    return _scheduled(config.learning_rate, config, step, steps)


class RateChange(NamedTuple):
    """AdamW's learning rate at one step under a run's previous options and under the present ones."""

    step: int
    """From 1: the next step, or the last one of a run that was finished."""
    before: float
    after: float
    jumps: bool
    """The other number of steps alone changes it by more than RATE_TOLERANCE."""


def rate_change(before: Optim, steps_before: int, after: Optim, steps: int, done: int) -> RateChange | None:
    """How the learning rate changes where a run resumes after ``done`` steps; None if no step is left."""
    if done >= steps:
        return None
    step = min(done, steps_before - 1)
    old, new = learning_rate(before, step, steps_before), learning_rate(after, step, steps)
    of_old_steps = learning_rate(after, step, steps_before)
    return RateChange(step + 1, old, new, not math.isclose(of_old_steps, new, rel_tol=RATE_TOLERANCE))


def _scheduled(peak: float, config: Optim, step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return peak * warmup * _cooldown(config, step, steps)


def cooldown_start(config: Optim, steps: int) -> int:
    """The number of updates before the first one of the cooldown; ``steps`` if there is none."""
    return steps if config.cooldown == "constant" else steps - round(steps * config.cooldown_fraction)


def _muon_decay(config: Muon, step: int, steps: int) -> float:
    return 1 - step / steps if config.muon_weight_decay_schedule == "linear" else _cooldown(config, step, steps)


def _cooldown(config: Optim, step: int, steps: int) -> float:
    start = cooldown_start(config, steps)
    if step < start or start == steps:
        return 1.0
    progress = (step - start) / (steps - start)
    descent = progress if config.cooldown == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - descent * (1.0 - config.final_learning_rate_fraction)
