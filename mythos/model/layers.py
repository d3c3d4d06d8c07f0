"""The basic layers of every block.

Shape suffixes in this package: B batch, S sequence, D width, H query heads, K key/value heads, C channels of a head,
F hidden size of a feed-forward layer, E experts, T tokens (B x S), V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import FeedForward
from mythos.model.precision import Linear
from mythos.model.rules import Rule, Start


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), gate and up in one matrix (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden_size)
        self.down = Linear(hidden_size, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The output projection is zero: every block starts as the identity."""
        return {self.down.weight: torch.zeros_like}

    def stacked_matrices(self) -> dict[Tensor, int]:
        """Gate and up."""
        return {self.gate_up.weight: 2}

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BSF) * up_BSF)


class SquaredReLU(nn.Module):
    """y = factor W_down relu(W_up x)^2 (So et al. 2021, arXiv 2109.08668).

    Muon's updates of W_down do not depend on the factor, so it also scales how much an update changes y.
    """

    def __init__(self, width: int, hidden_size: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.up = Linear(width, hidden_size)
        self.down = Linear(hidden_size, width)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The output projection is zero: every block starts as the identity."""
        return {self.down.weight: torch.zeros_like}

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden_BSF = F.relu(self.up(x_BSD))
        return self.factor * self.down(hidden_BSF * hidden_BSF)  # autocast on a GPU would square in fp32


def feed_forward(width: int, config: FeedForward) -> nn.Module:
    """The dense feed-forward layer that the configuration names."""
    match config.kind:
        case "swiglu":
            return SwiGLU(width, config.hidden_size)
        case "relu2":
            return SquaredReLU(width, config.hidden_size, config.relu2_factor)


def rotary_angles(length: int, head_size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x base^(-2i/C), each (S, C/2) in fp32 (RoPE, Su et al. 2021, arXiv 2104.09864).

    Computed in each forward pass.
    """
    frequencies = base ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angles_SC = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles_SC.cos(), angles_SC.sin()


def rotate(x_BHSC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs (i, i + C/2) by the position's angle, in fp32."""
    cos, sin = rotary
    first, second = x_BHSC.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x_BHSC)
