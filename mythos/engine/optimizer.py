"""The optimizer of the configuration over the parameter groups of a model: AdamW, or Muon and AdamW."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mythos.config.schema import Optim
from mythos.engine.muon import MuonAdamW
from mythos.engine.schedule import EXPERTS, MATRICES, OTHERS
from mythos.model.attention import GroupedQueryAttention
from mythos.model.block import Block
from mythos.model.layers import SwiGLU
from mythos.model.moe import Experts, Router


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """The routed experts, where there are any, are the last group: ZeRO wants them in a group of their own."""
    return _muon(model, config) if config.kind == "muon" else _adamw(model, config)


def _adamw(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); matrices decay, embedding tables, norms and vectors do not.

    torch's fused form needs no compiler, and DeepSpeed remaps its groups when experts are spread over ranks.
    """
    groups = [
        {"params": parameters, "role": role, "weight_decay": 0.0 if role == OTHERS else config.weight_decay}
        for role, parameters in zip((MATRICES, OTHERS, EXPERTS), _split(model), strict=True)
        if parameters
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def _muon(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """Muon for the blocks' matrices and the routed experts, AdamW without decay for the rest, as published.

    The rest: embedding tables and the tied head, norms, vectors, routers, and the injection's B and the readout C,
    which the published runs leave to AdamW for stability (arXiv 2604.12946).
    """
    experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    matrices = list(_block_matrices(model))
    by_muon = {id(parameter) for parameter in (*experts, *matrices)}
    rest = [p for p in model.parameters() if id(p) not in by_muon]
    groups = [{"params": rest, "role": OTHERS, "muon": False, "weight_decay": 0.0}]
    for role, parameters in ((MATRICES, matrices), (EXPERTS, experts)):
        if parameters:
            groups.append({"params": parameters, "role": role, "muon": True})
    return MuonAdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def stacked_matrices(model: nn.Module) -> dict[Tensor, int]:
    """How many matrices a parameter stacks along its rows, where that is more than one.

    Muon orthogonalises gate and up, and key and value, each by itself, however they are stored: AutoEP keeps the
    experts' gate and up as two parameters, and so do the published models.
    """
    stacked: dict[Tensor, int] = {}
    for module in model.modules():
        match module:
            case SwiGLU():
                stacked[module.gate_up.weight] = 2
            case GroupedQueryAttention():
                stacked[module.key_value.weight] = 2
            case Experts():
                stacked[module.gate_up_proj] = 2
    return stacked


def _block_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    for block in model.modules():
        if isinstance(block, Block):
            for module in block.modules():
                if not isinstance(module, nn.Embedding | Router | Experts):
                    yield from (p for p in module.parameters(recurse=False) if _dimensions(p) >= 2)


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
