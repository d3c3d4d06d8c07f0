"""The loop without compaction: every step works on every sequence and `where` keeps the result of those due."""

import torch
from torch import Tensor

from mythos.model.depth import DepthPlan
from mythos.model.loop import Loop


def masked_loop(loop: Loop, e_BSD: Tensor, rotary: tuple[Tensor, Tensor], plan: DepthPlan) -> Tensor:
    h_BSD = torch.zeros_like(e_BSD)
    without_grad, with_grad = torch.tensor(plan.without_grad), torch.tensor(plan.with_grad)
    for t in range(plan.most_without_grad):
        due = without_grad >= plan.most_without_grad - t
        with torch.no_grad():
            h_BSD = torch.where(due[:, None, None], loop.step(h_BSD, e_BSD, rotary), h_BSD)
    for t in range(plan.most_with_grad):
        due = with_grad >= plan.most_with_grad - t
        h_BSD = torch.where(due[:, None, None], loop.step(h_BSD, e_BSD, rotary), h_BSD)
    return h_BSD
