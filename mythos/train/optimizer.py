"""AdamW over the parameter groups of a model."""

import torch
from torch import nn

from mythos.config.schema import Optim
from mythos.model.moe import Experts


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); matrices decay, embedding tables, norms and vectors do not.

    torch's fused form needs no compiler, and DeepSpeed remaps its groups when experts are spread over ranks.
    """
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in zip(_split(model), (config.weight_decay, 0.0, config.weight_decay), strict=True)
        if parameters
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices; tables, norms and vectors; routed experts, which ZeRO wants in a group of their own."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in experts]
    matrices = [p for p in parameters if _dimensions(p) >= 2 and id(p) not in tables]
    others = [p for p in parameters if _dimensions(p) < 2 or id(p) in tables]
    return matrices, others, [p for p in model.parameters() if id(p) in experts]


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter: spread over ranks by ZeRO-3, it looks like an empty vector."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
