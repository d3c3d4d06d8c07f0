"""The loop without compaction: every step works on every sequence and `where` keeps the result of those due."""

import torch

from mythos.model.depth import DepthPlan
from mythos.model.loop import Loop, LoopInputs, State


def masked_loop(loop: Loop, inputs: LoopInputs, plan: DepthPlan) -> State:
    state = loop._initial_state(inputs.e_BSD, plan)
    without_grad, with_grad = torch.tensor(plan.without_grad), torch.tensor(plan.with_grad)
    for t in range(plan.most_without_grad):
        with torch.no_grad():
            state = keep_due(without_grad >= plan.most_without_grad - t, loop.step(state, inputs, False, False), state)
    state["penalty"] = torch.zeros_like(state["penalty"])
    for t in range(plan.most_with_grad):
        last = t == plan.most_with_grad - 1
        state = keep_due(with_grad >= plan.most_with_grad - t, loop.step(state, inputs, last, False), state)
    return state


def keep_due(due: torch.Tensor, after: State, before: State) -> State:
    return {
        name: torch.where(due.view(-1, *[1] * (after[name].ndim - 1)), after[name], before[name]) for name in before
    }
