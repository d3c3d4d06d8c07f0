"""How the loss depends on the loop steps at test time: L(T) = L_inf + Z exp(-z T) (arXiv 2604.12946)."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from mythos.errors import UserError

LEAST_DEPTHS = 4


@dataclass(frozen=True)
class DepthLaw:
    """L(T) = floor + gain exp(-rate T)."""

    floor: float
    gain: float
    rate: float

    def __str__(self) -> str:
        """With Z exp(-z), what the loops after the first one gain, in place of Z, which may be huge."""
        after_first = self.gain * np.exp(-self.rate)
        return f"{self.floor:.4f} + {after_first:.3g} exp(-{self.rate:.3g} (T - 1))"

    def loss(self, loop_steps: np.ndarray) -> np.ndarray:
        """The loss at these depths."""
        return self.floor + self.gain * np.exp(-self.rate * loop_steps)


def fit_depth(loop_steps: np.ndarray, losses: np.ndarray) -> DepthLaw:
    """The depth law through measured losses. Raises UserError with fewer than 4 depths."""
    if len(losses) < LEAST_DEPTHS:
        raise UserError(f"{len(losses)} depths: the law of the depth has 3 constants: evaluate at 4 or more depths")
    span = max(float(losses.max() - losses.min()), 1e-6)

    def residuals(constants: np.ndarray) -> np.ndarray:
        floor, log_gain, log_rate = constants
        return floor + np.exp(log_gain - np.exp(log_rate) * loop_steps) - losses

    results = [
        least_squares(residuals, [losses.min(), np.log(span) + rate, np.log(rate)], x_scale="jac", max_nfev=2000)
        for rate in (0.1, 0.3, 1.0)
    ]
    floor, log_gain, log_rate = min(results, key=lambda result: result.cost).x
    return DepthLaw(float(floor), float(np.exp(log_gain)), float(np.exp(log_rate)))
