"""How the loop's state and the prelude's output meet at the start of every loop step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LTIInjection(nn.Module):
    """h <- a * h + dt * (B e): a linear time-invariant system, stable by construction (arXiv 2604.12946).

    a = exp(-dt * exp(log_decay)) in (0, 1) for each channel, dt = softplus(step_bias), B (D, D). The spectral radius of
    the linear part is max(a) < 1: exp(-x) rounds to exactly 1 in fp32 for x below 3e-8 (in bf16 below 2e-3), so a is
    computed in fp32 whatever the training type, and x is kept above 1e-7.

    Args:
        h: state, (B, S, D). e: normalised output of the prelude, (B, S, D).
    """

    LEAST_EXPONENT = 1e-7
    LARGEST_LOG = 50.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.empty(width))
        self.step_bias = nn.Parameter(torch.empty(width))
        self.input = nn.Linear(width, width, bias=False)

    def decay(self) -> Tensor:
        """a, (D,), in fp32."""
        # Clamped so that neither factor can overflow: 0 * inf would be NaN.
        log_decay = self.log_decay.float().clamp(-self.LARGEST_LOG, self.LARGEST_LOG)
        return torch.exp(-(self._step() * torch.exp(log_decay)).clamp(min=self.LEAST_EXPONENT))

    def spectral_radius(self) -> Tensor:
        """Largest factor by which the linear part stretches the state, below 1."""
        return self.decay().max()

    def forward(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        kept = self.decay() * h_BSD.float()
        return (kept + self._step() * self.input(e_BSD).float()).type_as(h_BSD)

    def _step(self) -> Tensor:
        return F.softplus(self.step_bias.float())
