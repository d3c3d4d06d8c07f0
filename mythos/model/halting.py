"""Adaptive computation time: how much each loop step counts for each token."""

import torch
from torch import Tensor, nn

from mythos.config.model_schema import Halting


class ACTHalting(nn.Module):
    """Adaptive computation time (Graves 2016, arXiv 1603.08983) over the steps of the loop.

    p_t = sigmoid(w . h_t + b). While sum p stays below the threshold a step has weight p_t; the step that reaches it,
    or the last one, has the remainder 1 - sum of the weights before, so the weights sum to 1 for every token. The
    output is sum_t weight_t h_t. Ponder cost of a token: steps taken + remainder.

    In training it weighs states and never changes how often the loop runs: that must be the same on all ranks.
    """

    def __init__(self, width: int, config: Halting) -> None:
        super().__init__()
        self.threshold = config.threshold
        self.gate = nn.Linear(width, 1)

    def start(self, h_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Before the first step: weighted output (B, S, D), sum of the weights (B, S), ponder cost (B, S); all zero."""
        zeros_BS = torch.zeros(h_BSD.shape[:2], device=h_BSD.device, dtype=torch.float32)
        return torch.zeros_like(h_BSD), zeros_BS, zeros_BS.clone()

    def forward(
        self, h_BSD: Tensor, output_BSD: Tensor, sum_BS: Tensor, ponder_BS: Tensor, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let in the state after a loop step."""
        probability_BS = torch.sigmoid(self.gate(h_BSD).float()).squeeze(-1)
        running = sum_BS < self.threshold
        halts = running & ((sum_BS + probability_BS >= self.threshold) | last)
        remainder_BS = 1 - sum_BS
        weight_BS = torch.where(halts, remainder_BS, torch.where(running, probability_BS, 0.0))
        output_BSD = output_BSD + weight_BS[..., None].type_as(h_BSD) * h_BSD
        sum_BS = torch.where(halts, 1.0, sum_BS + weight_BS)
        ponder_BS = ponder_BS + running + torch.where(halts, remainder_BS, 0.0)
        return output_BSD, sum_BS, ponder_BS

    def halted(self, sum_BS: Tensor) -> Tensor:
        """Which tokens need no further step."""
        return sum_BS >= self.threshold
