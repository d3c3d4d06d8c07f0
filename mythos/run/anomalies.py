"""Signs in the numbers of a step that training goes wrong: a spike of the loss, a collapse of the routing."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat

from mythos.readers import Count

if TYPE_CHECKING:
    from torch import Tensor

DECAY = 0.98
FIRST_STEPS = 50
"""The first steps only update the statistics, because mean and deviation are not known yet."""
SMALLEST_DEVIATION = 0.01
"""Relative to the mean: on very uniform data a harmless change is many standard deviations."""


@dataclass
class LossStatistics:
    """Running mean and variance of the loss, to find spikes: losses more than ``sigma`` deviations above the mean.

        m <- m + r (x - m),   v <- (1 - r) (v + r (x - m)^2),   r = max(1 / (n + 1), 1 - DECAY)

    (West 1979, https://doi.org/10.1145/359146.359153). A spike enters as the highest loss that would not be a spike, so
    that after a lasting change of level the losses stop being spikes. Plain numbers, saved in checkpoints.
    """

    mean: FiniteFloat = 0.0
    variance: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    steps: Count = 0

    def deviations(self, loss: float) -> float:
        """Standard deviations of ``loss`` above the running mean; 0 while too few losses are known."""
        if self.steps < FIRST_STEPS or not math.isfinite(loss):
            return 0.0
        deviation = max(math.sqrt(self.variance), SMALLEST_DEVIATION * abs(self.mean))
        return (loss - self.mean) / deviation if deviation else 0.0

    def update(self, loss: float, sigma: float) -> None:
        """Add a step's loss to the running mean and variance; a loss that is not finite is left out."""
        if not math.isfinite(loss):
            return
        deviations = self.deviations(loss)
        if deviations > sigma:
            loss = self.mean + (loss - self.mean) * sigma / deviations
        rate = max(1 / (self.steps + 1), 1 - DECAY)
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference**2)
        self.steps += 1


class CollapseWatch:
    """Warns when one expert of a layer gets more than half of the tokens for many steps in a row."""

    def __init__(self, experts_per_token: int, limit_steps: int) -> None:
        self._experts_per_token, self._limit_steps = experts_per_token, limit_steps
        self._steps = 0

    def update(self, load_LE: "Tensor") -> str | None:
        """A warning at every ``limit_steps``-th step of a collapse, else None.

        Args:
            load_LE: tokens of each expert of each layer in this step, over all ranks.
        """
        share_LE = load_LE * self._experts_per_token / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
        layer, expert = divmod(int(share_LE.argmax()), load_LE.shape[1])
        share = share_LE[layer, expert].item()
        self._steps = self._steps + 1 if share > 0.5 else 0
        if not self._steps or self._steps % self._limit_steps:
            return None
        return (
            f"expert {expert} of mixture-of-experts layer {layer} gets {share:.0%} of the tokens; for {self._steps} "
            "steps now some expert has had more than half: raise model.core_experts.balance_rate or balance_loss"
        )
