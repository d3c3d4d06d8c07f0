"""Mixture of experts for one token at a time, directly from its definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.moe import MoE


def slow_moe(module: MoE, x_BSD: Tensor, logit_bias_E: Tensor | float = 0.0) -> Tensor:
    config, rows = module.config, []
    for x_D in x_BSD.reshape(-1, x_BSD.shape[-1]):
        logits = module.router.weight @ x_D + logit_bias_E
        scores = torch.sigmoid(logits) if config.scores == "sigmoid" else logits.exp() / logits.exp().sum()
        biased = (scores + module.router.e_score_correction_bias).tolist()
        open_experts = set(range(len(biased)))
        if config.groups is not None:
            size = len(biased) // config.groups
            members = [range(group * size, (group + 1) * size) for group in range(config.groups)]
            worth = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
            best = sorted(range(config.groups), key=lambda group: -worth[group])[: config.groups_per_token]
            open_experts = {e for group in best for e in members[group]}
        chosen = sorted(open_experts, key=lambda e: -biased[e])[: config.experts_per_token]
        total = sum(scores[e] for e in chosen) if config.normalise else 1
        y_D = module.shared_experts(x_D)
        for e in chosen:
            gate, up = (module.experts.gate_up_proj[e] @ x_D).chunk(2)
            y_D = y_D + config.route_scale * scores[e] / total * (module.experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD)
