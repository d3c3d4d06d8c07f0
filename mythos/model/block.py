"""Transformer blocks: the plain one of prelude, coda and dense baseline, and the block of the recurrent core."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos.config.model_schema import Dense, Looped
from mythos.model.attention import build_attention
from mythos.model.cache import LayerCache
from mythos.model.layers import feed_forward
from mythos.model.moe import MoE, RouterBias, Routing, logit_offset, observe_routing, routing_penalties
from mythos.model.parameters import Role
from mythos.model.precision import RMSNorm
from mythos.model.rules import Rule, Start


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + feed_forward(norm(x)); x is (B, S, D)."""

    parameter_role = Role.BLOCK
    residual_scale = 1.0
    """Factor on what the layers add; only the core has another one."""

    def __init__(self, config: Looped | Dense, feed_forward: nn.Module, value_gate: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = build_attention(config.width, config.attention, value_gate)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.feed_forward = feed_forward

    def attend(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embedding: Tensor | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x after attention, and norm(x), the input of the feed-forward layer."""
        attended_BSD = self.attention(self.attention_norm(x_BSD), rotary, value_embedding, cache)
        x_BSD = torch.add(x_BSD, attended_BSD, alpha=self.residual_scale)
        return x_BSD, self.feed_forward_norm(x_BSD)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embedding: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BSD, normed_BSD = self.attend(x_BSD, rotary, value_embedding, cache)
        return x_BSD + self.feed_forward(normed_BSD)


class Adapter(nn.Module):
    """U_t V_t x: a low-rank difference between the loop steps, which otherwise share their weights.

    ``up`` is U (loops, D, rank), ``down`` is V (loops, rank, D). Steps after the last pair use the last one (relaxed
    recursive transformers, Bae et al. 2024, arXiv 2410.20672).
    """

    def __init__(self, width: int, rank: int, loops: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(loops, rank, width))
        self.up = nn.Parameter(torch.empty(loops, width, rank))

    def initial_values(self, start: Start) -> dict[Tensor, Rule]:
        """U is zero: all steps start with the same weights."""
        return {self.up: torch.zeros_like}

    def forward(self, x_BSD: Tensor, loop_step_B: Tensor) -> Tensor:
        """``loop_step_B`` is each sequence's own loop step, from 0."""
        which_B = loop_step_B.clamp(max=len(self.down) - 1)
        return torch.einsum("bdr,bsr->bsd", self.up[which_B], torch.einsum("brd,bsd->bsr", self.down[which_B], x_BSD))


class CoreOutput(NamedTuple):
    """Output of a core block: the residual stream, its routing penalties and, if requested, its routing."""

    x_BSD: Tensor
    penalties_BP: Tensor | None
    routing: Routing | None


class CoreBlock(Block):
    """A block whose feed-forward layer may be a mixture of experts, with a parallel adapter for each loop step.

    x <- x + s attention(norm(x)); x <- x + s (feed_forward(n) + U_t V_t n) with n = norm(x), t the sequence's loop step
    and s the residual scale. The logits of a router have a bias by loop step if so configured.
    """

    def __init__(self, config: Looped, value_gate: bool, residual_scale: float) -> None:
        experts = config.core_experts
        layer = MoE(config.width, experts) if experts else feed_forward(config.width, config.feed_forward)
        super().__init__(config, layer, value_gate)
        self.expert_config = experts
        self.penalised = experts is not None and (experts.balance_loss > 0 or experts.router_z_loss > 0)
        self.adapter = Adapter(config.width, config.adapter_rank, config.adapter_loops) if config.adapter_rank else None
        rows = experts.router_bias_per_loop if experts else 0
        self.router_bias = RouterBias(rows, experts.experts) if experts and rows else None
        self.residual_scale = residual_scale

    def forward(  # type: ignore[override]
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embedding: Tensor | None,
        cache: LayerCache | None,
        loop_step_B: Tensor,
        observe: bool,
    ) -> CoreOutput:
        """``loop_step_B`` counts each sequence's own loop steps from 0; ``observe`` requests the routing."""
        scale = self.residual_scale
        x_BSD, normed_BSD = self.attend(x_BSD, rotary, value_embedding, cache)
        with self._routed_by_step(normed_BSD, loop_step_B):
            x_BSD = torch.add(x_BSD, self.feed_forward(normed_BSD), alpha=scale)
        if self.adapter is not None:
            x_BSD = torch.add(x_BSD, self.adapter(normed_BSD, loop_step_B), alpha=scale)
        penalise = self.penalised and torch.is_grad_enabled()  # a penalty matters only by its gradient
        if self.expert_config is None or not (penalise or observe):
            return CoreOutput(x_BSD, None, None)
        with torch.set_grad_enabled(penalise), self._routed_by_step(normed_BSD, loop_step_B):
            routing = observe_routing(self.feed_forward, normed_BSD, self.expert_config)
            penalties_BP = routing_penalties(routing, self.expert_config) if penalise else None
        return CoreOutput(x_BSD, penalties_BP, routing if observe else None)

    def _routed_by_step(self, x_BSD: Tensor, loop_step_B: Tensor) -> AbstractContextManager[None]:
        """Within it, the router adds its bias of these loop steps to the logits of x."""
        if self.router_bias is None:
            return nullcontext()
        bias_BE = self.router_bias(loop_step_B)
        return logit_offset(self.feed_forward, bias_BE[:, None].expand(-1, x_BSD.shape[1], -1))
