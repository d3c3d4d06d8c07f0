"""Adaptive computation time: how much each loop step counts for each token."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos.config.model_schema import Halting
from mythos.model.precision import FP32Linear
from mythos.model.rules import Rule, Start, constant


class HaltingState(NamedTuple):
    """Per token, over the steps so far, in fp32: sum of weighted states, sum of the weights, ponder cost."""

    output_BSD: Tensor
    weight_BS: Tensor
    ponder_BS: Tensor

    def weighted_mean(self, h_BSD: Tensor) -> Tensor:
        """The output; the weight that an early exit has left of a token goes to its last state ``h_BSD``."""
        return (self.output_BSD + (1 - self.weight_BS)[..., None] * h_BSD).type_as(h_BSD)


class ACTHalting(nn.Module):
    """Adaptive computation time (Graves 2016, arXiv 1603.08983) over the steps of the loop.

    p_t = sigmoid(w . h_t + b). While sum p is below the threshold, a step has weight p_t; the step that reaches it, or
    the last one, has the remainder 1 - sum of the previous weights, so the weights of every token sum to 1. The output
    is sum_t weight_t h_t. Ponder cost of a token: number of steps + remainder.

    In training this only weighs states and never changes the number of loop steps, which must be the same everywhere.
    """

    def __init__(self, width: int, config: Halting) -> None:
        super().__init__()
        self.threshold = config.threshold
        self.gate = FP32Linear(width, 1)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """p = 1 / mean depth at every step: tokens halt at that depth on average."""
        probability = min(1 / start.mean_depth, 0.99)
        bias = math.log(probability / (1 - probability))
        return {
            self.gate.weight: torch.zeros_like,
            self.gate.bias: constant(bias),
        }

    def start(self, h_BSD: Tensor) -> HaltingState:
        """The state before the first step: all zero."""
        zeros_BS = torch.zeros(h_BSD.shape[:2], device=h_BSD.device, dtype=torch.float32)
        return HaltingState(torch.zeros_like(h_BSD, dtype=torch.float32), zeros_BS, zeros_BS.clone())

    def forward(self, h_BSD: Tensor, before: HaltingState, last: bool) -> HaltingState:
        """Add the state ``h_BSD`` after a loop step."""
        weight_BS = before.weight_BS
        probability_BS = torch.sigmoid(self.gate(h_BSD).float()).squeeze(-1)
        running = weight_BS < self.threshold
        halts = running & ((weight_BS + probability_BS >= self.threshold) | last)
        remainder_BS = 1 - weight_BS
        step_BS = torch.where(halts, remainder_BS, torch.where(running, probability_BS, 0.0))
        return HaltingState(
            before.output_BSD + step_BS[..., None] * h_BSD,
            torch.where(halts, 1.0, weight_BS + step_BS),
            before.ponder_BS + running + torch.where(halts, remainder_BS, 0.0),
        )

    def halted(self, state: HaltingState) -> Tensor:
        """Which tokens (B, S) need no further step."""
        return state.weight_BS >= self.threshold
