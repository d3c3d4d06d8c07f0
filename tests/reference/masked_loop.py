"""The loop without compaction: every step computes every sequence, and `where` keeps the results of those due."""

import torch
from torch import Tensor

from mythos.model.depth import DepthPlan
from mythos.model.halting import HaltingState
from mythos.model.loop import Loop, LoopInputs, LoopState


def masked_loop(loop: Loop, inputs: LoopInputs, plan: DepthPlan) -> LoopState:
    state = loop._initial_state(inputs.e_BSD, plan)
    without_grad, with_grad = torch.tensor(plan.without_grad), torch.tensor(plan.with_grad)
    for t in range(plan.most_without_grad):
        with torch.no_grad():
            state = keep_due(without_grad >= plan.most_without_grad - t, loop.step(state, inputs, False, False), state)
    for t in range(plan.most_with_grad):
        last = t == plan.most_with_grad - 1
        state = keep_due(with_grad >= plan.most_with_grad - t, loop.step(state, inputs, last, False), state)
    return state


def keep_due(due_B: Tensor, after: LoopState, before: LoopState) -> LoopState:
    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(due_B.view(-1, *[1] * (new.ndim - 1)), new, old)

    halting = None
    if after.halting is not None:
        halting = HaltingState(*map(keep, after.halting, before.halting))
    return LoopState(
        keep(after.h_BSD, before.h_BSD),
        keep(after.loop_step_B, before.loop_step_B),
        keep(after.penalties_BP, before.penalties_BP),
        halting,
    )
