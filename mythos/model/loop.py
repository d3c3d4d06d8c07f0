"""The recurrent core: one set of weights, run as often as the depth plan says."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.config.schema import Looped
from mythos.model.block import Block
from mythos.model.depth import DepthPlan, due
from mythos.model.injection import LTIInjection
from mythos.model.layers import feed_forward
from mythos.model.moe import MoE, forget_load, moe_layers


class Loop(nn.Module):
    """h_0 = 0; h_{t+1} = core(a * h_t + dt * B e), T times; the last steps carry gradient.

    This module is the unit that ZeRO-3 gathers as one leaf: its weights come once forward and once backward, whatever
    T is. So every use of its parameters, also for diagnostics, must stay inside ``forward``.
    """

    def __init__(self, config: Looped, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.injection = LTIInjection(config.width)
        self.core = nn.ModuleList(Block(config, self._feed_forward(config)) for _ in range(config.core_layers))

    @staticmethod
    def _feed_forward(config: Looped) -> nn.Module:
        if config.core_experts is not None:
            return MoE(config.width, config.core_experts)
        return feed_forward(config.width, config.feed_forward)

    def step(self, h_BSD: Tensor, e_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One loop step."""
        h_BSD = self.injection(h_BSD, e_BSD)
        for block in self.core:
            h_BSD = block(h_BSD, rotary)
        return h_BSD

    def forward(
        self, e_BSD: Tensor, rotary: tuple[Tensor, Tensor], plan: DepthPlan
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The final state (B, S, D) and diagnostics (scalars, without gradient)."""
        h_BSD = torch.zeros_like(e_BSD)
        with torch.no_grad():
            h_BSD, _ = self._advance(h_BSD, e_BSD, rotary, plan.without_grad, plan.most_without_grad)
        # From here on the counters hold the load of the steps with gradient alone; recomputation comes later.
        forget_load(moe_layers(self))
        h_BSD, previous_BSD = self._advance(h_BSD, e_BSD, rotary, plan.with_grad, plan.most_with_grad)
        with torch.no_grad():
            norm = h_BSD.float().norm()
            health = {
                "spectral_radius": self.injection.spectral_radius(),
                "state_norm": norm / h_BSD[..., 0].numel() ** 0.5,
                "state_change": (h_BSD - previous_BSD).float().norm() / norm,
            }
        return h_BSD, health

    def _advance(
        self, h_BSD: Tensor, e_BSD: Tensor, rotary: tuple[Tensor, Tensor], steps: Sequence[int], most: int
    ) -> tuple[Tensor, Tensor]:
        """``most`` loop steps, each on the sequences still due; also returns the state before the last one.

        A rank with no sequence due takes part with none, so that all ranks' collectives match.
        """
        previous_BSD = h_BSD
        for steps_left in range(most, 0, -1):
            previous_BSD = h_BSD
            rows = due(steps, steps_left)
            if len(rows) == len(steps):
                h_BSD = self._checkpointed_step(h_BSD, e_BSD, rotary)
            else:
                index = torch.tensor(rows, dtype=torch.long, device=h_BSD.device)
                h_BSD = h_BSD.index_copy(0, index, self._checkpointed_step(h_BSD[index], e_BSD[index], rotary))
        return h_BSD, previous_BSD

    def _checkpointed_step(self, h_BSD: Tensor, e_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Reentrant recomputation of a loop gives silently wrong gradients under ZeRO-3: each loop step's backward
            # would reduce the shared weights' gradients anew.
            return checkpoint(self.step, h_BSD, e_BSD, rotary, use_reentrant=False, preserve_rng_state=False)
        return self.step(h_BSD, e_BSD, rotary)
