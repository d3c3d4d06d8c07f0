"""The learning rate as a function of the step."""

import math

from mythos.config.schema import Optim


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Learning rate of update number ``step`` (from 0) out of ``steps``.

    Linear warm-up from 0 to the peak, constant, then the cooldown over the last ``cooldown_fraction`` of the steps.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * _cooldown(config, step, steps)


def _cooldown(config: Optim, step: int, steps: int) -> float:
    start = steps - round(steps * config.cooldown_fraction)
    if config.cooldown == "constant" or step < start:
        return 1.0
    progress = (step - start) / (steps - start)
    descent = progress if config.cooldown == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - descent * (1.0 - config.final_learning_rate_fraction)
