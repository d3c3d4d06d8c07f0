"""How the prelude's output enters the loop's state at the start of every loop step.

In all equations h is the state and e the normalised output of the prelude, both (B, S, D).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import Looped
from mythos.model.precision import Linear
from mythos.model.rules import Rule, Start, constant, identity

POWER_ITERATIONS = 100
INITIAL_DECAY = math.sqrt(1 / 5)
"""a of every channel at the start (arXiv 2604.12946)."""


class LTIInjection(nn.Module):
    """h <- a * h + dt * (B e): a linear time-invariant system, stable by construction (arXiv 2604.12946).

    a = exp(-dt * exp(log_decay)) in (0, 1) and dt = softplus(step_bias) for each channel (D,); B is (D, D). The
    spectral radius of the linear part is max(a) < 1: exp(-x) rounds to exactly 1 in fp32 for x below 3e-8 (in bf16
    below 2e-3), so a is computed in fp32 whatever the training type, and x is kept above 1e-7.

    ``exact``: h <- a * h + (1 - a) / exp(log_decay) * (B e), which solves dh/dt = -exp(log_decay) h + B e over dt while
    e stays the same (zero-order hold; Gu & Dao 2023, arXiv 2312.00752, equation 4). dt is its limit for small dt.
    """

    LEAST_EXPONENT = 1e-7
    LARGEST_LOG = 50.0

    def __init__(self, width: int, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        # Rounded, they would change how long the loop remembers.
        self.log_decay = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.step_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.input = Linear(width, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """a = ``INITIAL_DECAY`` and dt = -log a in every channel, B the identity."""
        step_bias = math.log(math.expm1(-math.log(INITIAL_DECAY)))  # softplus of it is dt
        return {
            self.log_decay: torch.zeros_like,
            self.step_bias: constant(step_bias),
            self.input.weight: identity(),
        }

    def decay(self) -> Tensor:
        """a, (D,), in fp32."""
        return torch.exp(-self._exponent())

    def spectral_radius(self) -> Tensor:
        """max(a), below 1."""
        return self.decay().max()

    def forward(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        kept = self.decay() * h_BSD.float()
        return (kept + self._gain() * self.input(e_BSD).float()).type_as(h_BSD)

    def _gain(self) -> Tensor:
        """dt, or with x = dt * exp(log_decay) its exact form dt * (1 - exp(-x)) / x, (D,)."""
        if not self.exact:
            return self._step()
        x_D = self._exponent()
        return self._step() * (-torch.expm1(-x_D) / x_D)

    def _exponent(self) -> Tensor:
        # Clamped so that neither factor can overflow: 0 * inf would be NaN.
        log_decay = self.log_decay.float().clamp(-self.LARGEST_LOG, self.LARGEST_LOG)
        return (self._step() * torch.exp(log_decay)).clamp(min=self.LEAST_EXPONENT)

    def _step(self) -> Tensor:
        return F.softplus(self.step_bias.float())


class LinearInjection(nn.Module):
    """h <- W_h h + W_e e, learned and unconstrained, for comparison: the spectral radius of W_h may exceed 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = Linear(width, width)
        self.input = Linear(width, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The same function of (h, e) as the initial LTI injection."""
        return {
            self.state.weight: identity(INITIAL_DECAY),
            self.input.weight: identity(-math.log(INITIAL_DECAY)),
        }

    def spectral_radius(self) -> Tensor:
        """rho(W_h) = lim |W_h^k x|^(1/k) (Gelfand), from the second half of the iterations.

        Unlike a Rayleigh quotient, averaged growth is also right for complex pairs of eigenvalues.
        """
        weight = self.state.weight.float()
        # A fixed start with a component in every direction; a random one would make the metric irreproducible.
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
        return self.state(h_BSD).type_as(h_BSD) + self.input(e_BSD).type_as(h_BSD)


class AdditiveInjection(nn.Module):
    """h <- h + e, without parameters, for comparison."""

    def spectral_radius(self) -> Tensor:
        """1: the state is kept unchanged."""
        return torch.ones(())

    def forward(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        return h_BSD + e_BSD


def build_injection(config: Looped) -> LTIInjection | LinearInjection | AdditiveInjection:
    """The injection that the configuration names."""
    match config.injection:
        case "lti" | "lti_exact":
            return LTIInjection(config.width, exact=config.injection == "lti_exact")
        case "linear":
            return LinearInjection(config.width)
        case "additive":
            return AdditiveInjection()
