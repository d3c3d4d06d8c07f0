"""The recurrent core: one set of weights, run as often as the depth plan says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.config.model_schema import Looped
from mythos.model.attention import has_value_embedding
from mythos.model.block import CoreBlock
from mythos.model.depth import DepthPlan, due
from mythos.model.halting import ACTHalting
from mythos.model.injection import build_injection
from mythos.model.layers import initial_deviation
from mythos.model.moe import forget_load, moe_layers

State = dict[str, Tensor]
"""What each sequence carries from loop step to loop step; the first dimension of every tensor is the batch."""

ExitRule = Callable[[Tensor, Tensor, Tensor | None], bool]
"""(state before, state after, which tokens have halted or None) -> leave the loop; for evaluation.

Under expert parallelism all ranks must decide alike.
"""


@dataclass(frozen=True)
class LoopInputs:
    """What stays the same at every loop step; the value embeddings are those of the core's layers."""

    e_BSD: Tensor
    value_embeddings: Sequence[Tensor | None]
    rotary: tuple[Tensor, Tensor]

    def rows(self, index: Tensor) -> "LoopInputs":
        """Those of some sequences."""
        chosen = [None if value is None else value[index] for value in self.value_embeddings]
        return LoopInputs(self.e_BSD[index], chosen, self.rotary)


class Loop(nn.Module):
    """h_{t+1} = core(inject(h_t, e)), T times; the last steps carry gradient.

    This module is the unit that ZeRO-3 gathers as one leaf: its weights come once forward and once backward, whatever
    T is. So every use of its parameters, also for diagnostics, must stay inside ``forward``.
    """

    def __init__(self, config: Looped, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.noise_deviation = initial_deviation(config.width) if config.initial_state == "noise" else 0.0
        self.injection = build_injection(config)
        layers = config.prelude_layers + config.core_layers + config.coda_layers
        self.core = nn.ModuleList(
            CoreBlock(config, has_value_embedding(config, config.prelude_layers + layer, layers))
            for layer in range(config.core_layers)
        )
        self.step_embedding = nn.Embedding(config.loop_embeddings, config.width) if config.loop_embeddings else None
        self.halting = ACTHalting(config.width, config.halting) if config.halting else None

    def step(self, state: State, inputs: LoopInputs, last: bool, observe: bool) -> State:
        """One loop step. ``last``: no step follows; ``observe``: also note which experts each token goes to."""
        state = dict(state)
        h_BSD = self.injection(state["h"], inputs.e_BSD)
        if self.step_embedding is not None:
            row_B = state["loop_step"].clamp(max=self.step_embedding.num_embeddings - 1)
            h_BSD = h_BSD + self.step_embedding(row_B)[:, None]
        for layer, (block, value) in enumerate(zip(self.core, inputs.value_embeddings, strict=True)):
            h_BSD, penalty_B, routing = block(h_BSD, inputs.rotary, value, state["loop_step"], observe)
            if penalty_B is not None:
                state["penalty"] = state["penalty"] + penalty_B
            if routing is not None:
                state[f"chosen_{layer}"], state[f"scores_{layer}"] = routing.chosen_BSE, routing.scores_BSE.detach()
        state["h"], state["loop_step"] = h_BSD, state["loop_step"] + 1
        if self.halting is not None:
            state["output"], state["weights"], state["ponder"] = self.halting(
                h_BSD, state["output"], state["weights"], state["ponder"], last
            )
        return state

    def forward(
        self,
        e_BSD: Tensor,
        value_embeddings: list[Tensor | None],
        rotary: tuple[Tensor, Tensor],
        plan: DepthPlan,
        exit_rule: ExitRule | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The final state, or its halting-weighted mean, (B, S, D); the penalty to add to the loss; diagnostics.

        The penalty is the mean over sequences of the routing penalty of a step with gradient and core layer, plus the
        ponder cost, which the caller weighs: (2,). ``exit_rule`` may end the loop early, in evaluation.
        """
        inputs = LoopInputs(e_BSD, value_embeddings, rotary)
        state = self._initial_state(e_BSD, plan)
        with torch.no_grad():
            state, _, done_before = self._advance(state, inputs, plan.without_grad, plan.most_without_grad, False, None)
        # From here on the counters hold the load of the steps with gradient alone; recomputation comes later.
        forget_load(moe_layers(self))
        state["penalty"] = torch.zeros_like(state["penalty"])
        state, previous, done = self._advance(state, inputs, plan.with_grad, plan.most_with_grad, True, exit_rule)
        steps_B = torch.tensor(plan.with_grad, device=e_BSD.device)
        routing_penalty = (state["penalty"] / steps_B).mean() / len(self.core)
        ponder = state["ponder"].mean() if self.halting is not None else torch.zeros_like(routing_penalty)
        output = state["h"] if self.halting is None else self._halted_output(state)
        health = self._health(state, previous, plan)
        due_steps = sum(plan.without_grad) + sum(plan.with_grad)
        health["depth/done_over_due"] = torch.tensor((done_before + done) / due_steps)
        return output, torch.stack((routing_penalty, ponder)), health

    def _initial_state(self, e_BSD: Tensor, plan: DepthPlan) -> State:
        """h_0: zero, or noise of the embedding's standard deviation, cut at 3 of them, from a sequence's own seed."""
        state = {
            "h": torch.zeros_like(e_BSD),
            "loop_step": torch.zeros(len(e_BSD), dtype=torch.long, device=e_BSD.device),
            "penalty": torch.zeros(len(e_BSD), device=e_BSD.device),
        }
        if self.noise_deviation:
            generator = torch.Generator(e_BSD.device)
            limit = 3 * self.noise_deviation
            drawn_SD = torch.empty(e_BSD.shape[1:], device=e_BSD.device)  # fp32: bf16 would draw from a coarse grid
            for row_SD, seed in zip(state["h"], plan.state_seeds, strict=True):
                nn.init.trunc_normal_(drawn_SD, 0.0, self.noise_deviation, -limit, limit, generator.manual_seed(seed))
                row_SD.copy_(drawn_SD)
        if self.halting is not None:
            state["output"], state["weights"], state["ponder"] = self.halting.start(e_BSD)
        return state

    def _advance(
        self, state: State, inputs: LoopInputs, steps: Sequence[int], most: int, final: bool, exit_rule: ExitRule | None
    ) -> tuple[State, State, int]:
        """``most`` loop steps, each on the sequences still due.

        Also returns the state before the last step and the number of loop steps done, summed over sequences.

        A rank with no sequence due takes part with none, so that all ranks' collectives match.
        """
        previous, done = state, 0
        for steps_left in range(most, 0, -1):
            previous = state
            last, observe = final and steps_left == 1, final and steps_left <= 2
            rows = due(steps, steps_left)
            done += len(rows)
            if len(rows) == len(steps):
                state = state | self._checkpointed_step(state, inputs, last, observe)
            else:
                index = torch.tensor(rows, dtype=torch.long, device=inputs.e_BSD.device)
                own = {name: tensor[index] for name, tensor in state.items()}
                stepped = self._checkpointed_step(own, inputs.rows(index), last, observe)
                state = state | {name: _put(state.get(name), index, rows_, steps) for name, rows_ in stepped.items()}
            if exit_rule is not None and exit_rule(previous["h"], state["h"], self._halted(state)):
                break
        return state, previous, done

    def _checkpointed_step(self, state: State, inputs: LoopInputs, last: bool, observe: bool) -> State:
        if self.recompute and torch.is_grad_enabled():
            # Reentrant recomputation of a loop gives silently wrong gradients under ZeRO-3: each loop step's backward
            # would reduce the shared weights' gradients anew.
            return checkpoint(self.step, state, inputs, last, observe, use_reentrant=False, preserve_rng_state=False)
        return self.step(state, inputs, last, observe)

    def _halted(self, state: State) -> Tensor | None:
        return None if self.halting is None else self.halting.halted(state["weights"])

    def _halted_output(self, state: State) -> Tensor:
        """The weighted output; what an early exit left of a token's weight goes to its last state."""
        rest_BS = (1 - state["weights"])[..., None].type_as(state["h"])
        return state["output"] + rest_BS * state["h"]

    @torch.no_grad()
    def _health(self, state: State, previous: State, plan: DepthPlan) -> dict[str, Tensor]:
        h_BSD = state["h"]
        norm = h_BSD.float().norm()
        health = {
            "loop/spectral_radius": self.injection.spectral_radius(),
            "loop/state_norm": norm / h_BSD[..., 0].numel() ** 0.5,
            "loop/state_change": (h_BSD - previous["h"]).float().norm() / norm,
        }
        if self.halting is not None:
            health["loop/ponder"] = state["ponder"].mean()
        scores = [tensor for name, tensor in state.items() if name.startswith("scores_")]
        if scores:
            shares = torch.stack([score / score.sum(dim=-1, keepdim=True) for score in scores])
            health["moe/router_entropy"] = -(shares * shares.clamp(min=1e-20).log()).sum(dim=-1).mean()
            health["moe/choice_changed"] = self._choice_changed(state, previous, plan)
        return health

    def _choice_changed(self, state: State, previous: State, plan: DepthPlan) -> Tensor:
        """Share of tokens that went to other experts at the last step than at the one before."""
        deep_enough = torch.tensor(plan.with_grad, device=state["h"].device) >= 2
        changed = [
            (state[name] != previous[name]).any(dim=-1)[deep_enough].float().flatten()
            for name in state
            if name.startswith("chosen_") and name in previous
        ]
        together = torch.cat(changed) if changed else state["h"].new_zeros(0)
        return together.sum() / max(1, together.numel())


def _put(whole: Tensor | None, index: Tensor, rows: Tensor, batch: Sequence[int]) -> Tensor:
    """``rows`` in their places of the whole batch; where there was nothing before, zeros."""
    if whole is None:
        whole = rows.new_zeros(len(batch), *rows.shape[1:])
    return whole.index_copy(0, index, rows)
