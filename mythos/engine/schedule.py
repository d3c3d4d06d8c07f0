"""Learning rates, momentum and decay as functions of the step."""

import math
from typing import NamedTuple

from mythos.config.schema import Optim


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Learning rate of update number ``step`` (from 0) out of ``steps``.

    Linear warm-up from 0 to the peak, constant, then the cooldown over the last ``cooldown_fraction`` of the steps.
    """
    return _scheduled(config.learning_rate, config, step, steps)


class MuonStep(NamedTuple):
    """What Muon uses at one step."""

    learning_rate: float
    momentum: float
    weight_decay: float


def muon_step(config: Optim, step: int, steps: int) -> MuonStep | None:
    """Muon's numbers for update number ``step`` (from 0) out of ``steps``; None when it is not used.

    The learning rate has the form of AdamW's. The momentum rises linearly over its warm-up and then stays; the decay
    falls linearly, to 0 where the run ends.
    """
    if config.kind != "muon":
        return None
    warm = min(1.0, step / config.muon_momentum_warmup_steps) if config.muon_momentum_warmup_steps else 1.0
    return MuonStep(
        _scheduled(config.muon_learning_rate, config, step, steps),
        (1 - warm) * config.muon_momentum_start + warm * config.muon_momentum,
        config.muon_weight_decay * (1 - step / steps),
    )


def _scheduled(peak: float, config: Optim, step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return peak * warmup * _cooldown(config, step, steps)


def _cooldown(config: Optim, step: int, steps: int) -> float:
    start = steps - round(steps * config.cooldown_fraction)
    if config.cooldown == "constant" or step < start:
        return 1.0
    progress = (step - start) / (steps - start)
    descent = progress if config.cooldown == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - descent * (1.0 - config.final_learning_rate_fraction)
