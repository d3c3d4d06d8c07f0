"""The recurrent core with the options of newer work, one sequence at a time, from their equations."""

import torch
from torch import Tensor

from mythos.model.loop import Loop
from tests.reference.moe import slow_moe


def zero_order_hold(h_SD: Tensor, force_SD: Tensor, log_decay_D: Tensor, step_D: Tensor) -> Tensor:
    """h at time dt of dh/dt = -exp(log_decay) h + force, channel by channel, in fp64.

    With (h, force) as the state the system has no input: its solution is the exponential of a 2 x 2 matrix.
    """
    columns = []
    for h_S, force_S, log_decay, step in zip(h_SD.T, force_SD.T, log_decay_D, step_D, strict=True):
        rate, zero = -torch.exp(log_decay.double()), torch.zeros((), dtype=torch.float64)
        system = torch.stack((torch.stack((rate, zero + 1)), torch.stack((zero, zero))))
        after = torch.linalg.matrix_exp(step.double() * system)
        columns.append(after[0, 0] * h_S.double() + after[0, 1] * force_S.double())
    return torch.stack(columns, dim=1).float()


def newer_core(loop: Loop, h_SD: Tensor, e_SD: Tensor, rotary: tuple[Tensor, Tensor], depth: int) -> Tensor:
    """The state after ``depth`` steps: exact injection, what layers add divided by 3, a router bias by loop step."""
    injection = loop.injection
    for t in range(depth):
        step_D = torch.log(1 + torch.exp(injection.step_bias))
        h_SD = zero_order_hold(h_SD, e_SD @ injection.input.weight.T, injection.log_decay, step_D)
        for block in loop.core:
            h_SD = h_SD + block.attention(block.attention_norm(h_SD)[None], rotary, None)[0] / 3
            bias_E = block.router_bias.weight[min(t, len(block.router_bias.weight) - 1)]
            h_SD = h_SD + slow_moe(block.feed_forward, block.feed_forward_norm(h_SD), bias_E) / 3
    return h_SD
