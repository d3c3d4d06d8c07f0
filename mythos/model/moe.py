"""Sparse mixture of experts in plain PyTorch, with the names by which DeepSpeed's AutoEP finds its parts.

AutoEP replaces the complete module by its own expert-parallel layer. The contract of both forms: children
``router`` (with buffer ``e_score_correction_bias``), ``experts`` and ``shared_experts``, and a buffer
``tokens_per_expert`` that grows with every forward pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.model_schema import MixtureOfExperts
from mythos.model.grouped import Rows, grouped_linear, inverse
from mythos.model.layers import SwiGLU
from mythos.model.parameters import Role
from mythos.model.precision import FP32Linear
from mythos.model.rules import Rule, Start

TOKENS_PER_EXPERT = "tokens_per_expert"


class Gate(FP32Linear):
    """Logits W x, (..., D) -> (..., E), in fp32, plus an offset while there is one: see ``logit_offset``.

    AutoEP's form of the layer takes nothing but the tokens, so that the offset is set beside the call.
    """

    offset_BSE: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.offset_BSE is None else logits + self.offset_BSE.reshape(logits.shape)


class Router(Gate):
    """The gate, whose logits ``router_scores`` turns into scores.

    The balance bias (E,) is added to the scores when experts are chosen, but not to the experts' weights.
    """

    parameter_role = Role.ROUTER
    e_score_correction_bias: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))


class RouterBias(nn.Embedding):
    """Row t of a table (loops, E) for the logits at loop step t; steps after the last row use the last one."""

    def __init__(self, loops: int, experts: int) -> None:
        super().__init__(loops, experts, dtype=torch.float32)

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """Zero: all steps start with the same routing."""
        return {self.weight: torch.zeros_like}

    def forward(self, loop_step_B: Tensor) -> Tensor:
        """Rows (B, E)."""
        return super().forward(loop_step_B.clamp(max=self.num_embeddings - 1))


class Gated:
    """The part of experts between their products."""

    def gated(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """silu(gate) * up."""
        return F.silu(gate_TF) * up_TF


class Experts(Gated, nn.Module):
    """The routed experts' SwiGLU weights as 3-D parameters: gate_up_proj (E, 2F, D), down_proj (E, D, F)."""

    parameter_role = Role.EXPERT

    def __init__(self, width: int, config: MixtureOfExperts) -> None:
        super().__init__()
        hidden = config.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(config.experts, width, hidden))

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """The output projections are zero: every block starts as the identity."""
        return {self.down_proj: torch.zeros_like}

    def stacked_matrices(self) -> dict[Tensor, int]:
        """Gate and up of each expert."""
        return {self.gate_up_proj: 2}

    def forward(self, x_TD: Tensor, load_E: Tensor) -> Tensor:
        """``x_TD`` has the ``load_E[0]`` tokens of expert 0, then those of expert 1, and so on."""
        ends_E = load_E.cumsum(0, dtype=torch.int32)
        gate_TF, up_TF = grouped_linear(x_TD, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        return grouped_linear(self.gated(gate_TF, up_TF), self.down_proj, ends_E)


class RoutedSum:
    """The routed part of a layer whose ``experts`` take rows and load as ``Experts`` does."""

    experts: Any

    def routed_sum(self, x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor, load_E: Tensor) -> Tensor:
        """For each token the weighted sum of its experts' outputs, (T, D)."""
        order = chosen_Tk.flatten().argsort(stable=True)
        place = inverse(order)
        outputs_D = self.expert_outputs(Rows.apply(x_TD, order, place, chosen_Tk.shape[1]), load_E)
        outputs_D = Rows.apply(outputs_D, place, order, 1)
        return self.weighted_sum(outputs_D.unflatten(0, chosen_Tk.shape), weights_Tk).type_as(x_TD)

    def expert_outputs(self, rows_D: Tensor, load_E: Tensor) -> Tensor:
        """Apply each row's expert; the rows of expert 0 come first, then those of expert 1, and so on."""
        outputs_D: Tensor = self.experts(rows_D, load_E)
        return outputs_D

    def weighted_sum(self, outputs_TkD: Tensor, weights_Tk: Tensor) -> Tensor:
        """Over the experts of each token, in the type of the weights."""
        return (outputs_TkD * weights_Tk[..., None]).sum(dim=1)


class MoE(RoutedSum, nn.Module):
    """y = shared(x) + scale * sum over the chosen experts of w_e expert_e(x); no token is dropped.

    s = sigmoid or softmax of W x, in fp32; chosen = top-k of s + balance bias, among the best groups if there are
    groups; w = s of the chosen, normalised to sum 1 if so configured (DeepSeek-V3, arXiv 2412.19437). x, y: (B, S, D).
    """

    tokens_per_expert: Tensor

    def __init__(self, width: int, config: MixtureOfExperts) -> None:
        super().__init__()
        self.config = config
        self.router = Router(width, config.experts)
        self.experts = Experts(width, config)
        self.shared_experts = SwiGLU(width, config.shared_hidden_size)
        self.register_buffer(TOKENS_PER_EXPERT, torch.zeros(config.experts), persistent=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        scores_TE = router_scores(self.router(x_TD), self.config)
        chosen_Tk = choose_experts(scores_TE, self.router.e_score_correction_bias, self.config)
        weights_Tk = scores_TE.gather(1, chosen_Tk)
        if self.config.normalise:
            weights_Tk = weights_Tk / (weights_Tk.sum(dim=-1, keepdim=True) + 1e-20)
        weights_Tk = weights_Tk * self.config.route_scale

        load_E = torch.zeros_like(self.tokens_per_expert, dtype=torch.int32)
        load_E.scatter_add_(0, chosen_Tk.flatten(), load_E.new_ones(chosen_Tk.numel()))
        self.tokens_per_expert.add_(load_E)
        return self.routed_sum(x_TD, chosen_Tk, weights_Tk, load_E).view_as(x_BSD) + self.shared_experts(x_BSD)


def router_scores(logits: Tensor, config: MixtureOfExperts) -> Tensor:
    """Scores (..., E) from the router's logits, in fp32."""
    return torch.sigmoid(logits.float()) if config.scores == "sigmoid" else torch.softmax(logits.float(), dim=-1)


def choose_experts(scores_TE: Tensor, bias_E: Tensor, config: MixtureOfExperts) -> Tensor:
    """Indices (T, k) of the experts that each token goes to.

    With groups, a group's score is the sum of its two best experts' scores, and only experts of the best
    ``groups_per_token`` groups can be chosen.
    """
    biased_TE = scores_TE + bias_E
    if config.groups is not None and config.groups_per_token is not None:
        grouped = biased_TE.unflatten(-1, (config.groups, -1))
        best_groups = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config.groups_per_token, dim=-1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, False)
        biased_TE = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    return biased_TE.topk(config.experts_per_token, dim=-1).indices


class Routing(NamedTuple):
    """A router's output for a batch of sequences, computed outside the layer."""

    scores_BSE: Tensor
    logits_BSE: Tensor
    chosen_BSE: Tensor
    """Whether a token goes to an expert."""


def observe_routing(layer: Any, x_BSD: Tensor, config: MixtureOfExperts) -> Routing:
    """Evaluate a layer's router again, since AutoEP's form of the layer does not return its scores."""
    logits_BSE = _gate(layer)(x_BSD).float()
    scores_BSE = router_scores(logits_BSE, config)
    chosen = choose_experts(scores_BSE.detach().flatten(0, 1), layer.router.e_score_correction_bias, config)
    chosen_TE = torch.zeros_like(scores_BSE.flatten(0, 1), dtype=torch.bool).scatter(-1, chosen, True)
    return Routing(scores_BSE, logits_BSE, chosen_TE.view_as(scores_BSE))


@contextmanager
def logit_offset(layer: Any, offset_BSE: Tensor | None) -> Iterator[None]:
    """Within it, the layer's router adds the offset to the logits of these tokens."""
    _gate(layer).offset_BSE = offset_BSE
    try:
        yield
    finally:
        _gate(layer).offset_BSE = None


def _gate(layer: Any) -> Gate:
    """The router's linear part, in the plain or in AutoEP's form of a layer."""
    return getattr(layer.router, "gate", layer.router)


def routing_penalties(routing: Routing, config: MixtureOfExperts) -> Tensor:
    """For each sequence (B, 2): balance_loss * sum_e f_e P_e and router_z_loss * mean of logsumexp(logits)^2.

    f_e = share of the sequence's choices that are e, times E; P_e = mean normalised score of e
    (DeepSeek-V3's sequence-wise auxiliary loss, arXiv 2412.19437; router z-loss: ST-MoE, arXiv 2202.08906).
    """
    share_BE = routing.chosen_BSE.float().mean(dim=1) * (config.experts / config.experts_per_token)
    scores_BSE = routing.scores_BSE
    mean_score_BE = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=1)
    balance_B = (share_BE * mean_score_BE).sum(dim=-1)
    z_B = routing.logits_BSE.logsumexp(dim=-1).square().mean(dim=1)
    return torch.stack((config.balance_loss * balance_B, config.router_z_loss * z_B), dim=1)


def moe_layers(model: nn.Module) -> list[Any]:
    """The mixture-of-experts layers of a model, in the plain or in AutoEP's form, in the model's order."""
    return [module for module in model.modules() if TOKENS_PER_EXPERT in module._buffers]


def forget_load(layers: Iterable[Any]) -> None:
    """Reset the counters of tokens per expert to zero."""
    for layer in layers:
        layer.tokens_per_expert.zero_()


def expert_load(model: nn.Module) -> Tensor:
    """Tokens that each expert has received in this process since the last reset: (layers, E), fp32."""
    return torch.stack([layer.tokens_per_expert.float() for layer in moe_layers(model)])


@torch.no_grad()
def balance(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), once per optimizer step (Wang et al. 2024, arXiv 2408.15664).

    Then the bias is shifted to mean zero, which changes no choice: the signs do not add up to zero, and without it the
    bias would drift as a whole until it rounds the scores. ``load_LE`` must be the load of the whole batch, so that the
    bias is the same everywhere.
    """
    for layer, load_E in zip(moe_layers(model), load_LE, strict=True):
        bias_E = layer.router.e_score_correction_bias
        bias_E += rate * torch.sign(load_E.mean() - load_E)
        bias_E -= bias_E.mean()


def plain_parameters(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The plain model's parameters, each with those into which AutoEP splits it along dimension 1."""
    plain: dict[str, tuple[str, ...]] = {}
    for name in names:
        layer, found, part = name.rpartition(".experts.")
        if found and part in ("w1", "w3"):
            plain[f"{layer}.experts.gate_up_proj"] = (f"{layer}.experts.w1", f"{layer}.experts.w3")
        elif found and part == "w2":
            plain[f"{layer}.experts.down_proj"] = (name,)
        else:
            plain[name.replace(".router.gate.weight", ".router.weight")] = (name,)
    return plain
