"""Mixture-of-experts one token at a time, straight from the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.moe import MoE


def slow_moe(module: MoE, x_BSD: Tensor) -> Tensor:
    rows = []
    for x_D in x_BSD.reshape(-1, x_BSD.shape[-1]):
        scores = torch.sigmoid(module.router.weight @ x_D)
        biased = scores + module.router.e_score_correction_bias
        chosen = sorted(range(len(scores)), key=lambda e: -biased[e].item())[: module.experts_per_token]
        total = sum(scores[e] for e in chosen)
        y_D = module.shared_experts(x_D)
        for e in chosen:
            gate, up = (module.experts.gate_up_proj[e] @ x_D).chunk(2)
            y_D = y_D + scores[e] / total * (module.experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD)
