"""Looks at the numbers of every step for signs that the training goes wrong."""

import math
from dataclasses import asdict, dataclass

from torch import Tensor

DECAY = 0.98
FIRST_STEPS = 50
"""Losses that are only learned from: before, neither their mean nor their spread is known."""
SMALLEST_DEVIATION = 0.01
"""Of the mean: on very even data a harmless change is many standard deviations."""


@dataclass
class LossWatch:
    """Finds spikes: losses more than ``sigma`` standard deviations above the running mean.

        m <- m + r (x - m),   v <- (1 - r) (v + r (x - m)^2),   r = max(1 / (n + 1), 1 - DECAY)

    (West 1979, https://doi.org/10.1145/359146.359153). A spike is learned from as if it were the highest loss that is
    none, so that a lasting change of level is no spike for ever. The state is plain numbers, saved in checkpoints.
    """

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def deviations(self, loss: float) -> float:
        """How many standard deviations ``loss`` lies above the running mean; 0 as long as too few are known."""
        if self.steps < FIRST_STEPS or not math.isfinite(loss):
            return 0.0
        deviation = max(math.sqrt(self.variance), SMALLEST_DEVIATION * abs(self.mean))
        return (loss - self.mean) / deviation if deviation else 0.0

    def learn(self, loss: float, sigma: float) -> None:
        """Take a step's loss into the running mean and variance; a loss that is not finite tells nothing."""
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

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return asdict(self)


class CollapseWatch:
    """Warns when one expert of a layer is chosen by more than half of the tokens, for many steps in a row."""

    def __init__(self, experts_per_token: int, limit_steps: int) -> None:
        self._experts_per_token, self._limit_steps = experts_per_token, limit_steps
        self._steps = 0

    def look(self, load_LE: Tensor) -> str | None:
        """What there is to tell of a step, at every ``limit_steps``-th step that it lasts.

        Args:
            load_LE: tokens that each expert of each layer got in this step, over all ranks.
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
