"""How the loop's state and the prelude's output meet at the start of every loop step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import Looped

POWER_ITERATIONS = 100


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


class LinearInjection(nn.Module):
    """h <- W_h h + W_e e, learned and unconstrained, for comparison: nothing keeps rho(W_h) below 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        self.input = nn.Linear(width, width, bias=False)

    def spectral_radius(self) -> Tensor:
        """rho(W_h) = lim |W_h^k x|^(1/k) (Gelfand), from the second half of the iterations.

        Averaged growth, unlike a Rayleigh quotient, is right for complex pairs of eigenvalues too.
        """
        weight = self.state.weight.float()
        # A fixed start with some of every direction; a random one would make the metric irreproducible.
        vector = torch.cos(torch.arange(weight.shape[1], device=weight.device, dtype=torch.float32) ** 2)
        growth = torch.zeros((), device=weight.device)
        for iteration in range(POWER_ITERATIONS):
            vector = weight @ vector
            norm = vector.norm().clamp(min=1e-30)
            vector = vector / norm
            if iteration >= POWER_ITERATIONS // 2:
                growth = growth + norm.log()
        return torch.exp(growth / math.ceil(POWER_ITERATIONS / 2))

    def forward(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        return self.state(h_BSD) + self.input(e_BSD)


class AdditiveInjection(nn.Module):
    """h <- h + e, without parameters, for comparison: its spectral radius is 1."""

    def spectral_radius(self) -> Tensor:
        """1: the state is kept whole."""
        return torch.ones(())

    def forward(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        return h_BSD + e_BSD


def build_injection(config: Looped) -> LTIInjection | LinearInjection | AdditiveInjection:
    """The injection that the configuration names."""
    match config.injection:
        case "lti":
            return LTIInjection(config.width)
        case "linear":
            return LinearInjection(config.width)
        case "additive":
            return AdditiveInjection()
