"""The optimizer of the configuration over the parameter groups of a model: AdamW, or Muon and AdamW.

An optimizer is built by one function here and has one case in ``mythos.plan.schedule``: both use the same names of
parameter groups.
"""

import torch
from torch import Tensor, nn

from mythos.config.optim_schema import AdamW, Muon, Optim
from mythos.engine.muon import MuonAdamW
from mythos.model.parameters import Role, parameter_roles
from mythos.plan.schedule import EXPERTS, MATRICES, OTHERS


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """The routed experts, if there are any, are the last group: ZeRO needs them in a group of their own."""
    match config:
        case AdamW():
            return _adamw(model, config)
        case Muon():
            return _muon(model, config)


def _adamw(model: nn.Module, config: AdamW) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); decay for matrices, none for tables, norms and vectors.

    torch's fused form needs no compiler, and DeepSpeed adapts its groups when experts are spread over ranks.
    """
    parameters = _split(model, {Role.BLOCK, Role.ROUTER, Role.OTHER})
    groups = [
        {"params": parameters[name], "role": name, "weight_decay": 0.0 if name == OTHERS else config.weight_decay}
        for name in (MATRICES, OTHERS, EXPERTS)
        if parameters[name]
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def _muon(model: nn.Module, config: Muon) -> torch.optim.Optimizer:
    """Muon for the blocks' matrices and the routed experts, AdamW without decay for the rest, as published.

    The rest: embedding tables and the tied head, norms, vectors, routers, and the injection's B and the readout C,
    which the published runs leave to AdamW for stability (arXiv 2604.12946). Muon's decay comes from the schedule.
    """
    parameters = _split(model, {Role.BLOCK})
    of_muon = {"beta2": config.muon_beta2, "decay_by_shape": config.muon_decay_by_shape}
    groups = [
        {"params": parameters[name], "role": name, "muon": name != OTHERS, "weight_decay": 0.0} | of_muon
        for name in (OTHERS, MATRICES, EXPERTS)
        if parameters[name]
    ]
    return MuonAdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def _split(model: nn.Module, matrix_roles: set[Role]) -> dict[str, list[Tensor]]:
    """The parameters of each group; ``MATRICES`` are the matrices with one of the given roles."""
    groups: dict[str, list[Tensor]] = {MATRICES: [], OTHERS: [], EXPERTS: []}
    for parameter, role in parameter_roles(model).items():
        if role == Role.EXPERT:
            groups[EXPERTS].append(parameter)
        else:
            groups[MATRICES if _is_matrix(parameter) and role in matrix_roles else OTHERS].append(parameter)
    return groups


def _is_matrix(parameter: Tensor) -> bool:
    """Whether the complete parameter has rows and columns; under ZeRO-3 its own shape is that of an empty vector."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
