"""The recurrent core: one set of weights, run as often as the depth plan requires."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.config.derive import has_value_embedding
from mythos.config.model_schema import Looped
from mythos.loss import Mean
from mythos.model.block import CoreBlock
from mythos.model.depth import DepthPlan, due
from mythos.model.halting import ACTHalting, HaltingState
from mythos.model.injection import build_injection
from mythos.model.moe import forget_load, moe_layers
from mythos.model.rules import initial_deviation

ExitRule = Callable[[Tensor, Tensor, Tensor | None], bool]
"""(state before, state after, which tokens have halted or None) -> whether to leave the loop; for evaluation.

Processes that share experts must all decide the same.
"""


@dataclass(frozen=True)
class LoopInputs:
    """What is the same at every loop step; the value embeddings are those of the core's layers."""

    e_BSD: Tensor
    value_embeddings: Sequence[Tensor | None]
    rotary: tuple[Tensor, Tensor]

    def rows(self, index: Tensor) -> "LoopInputs":
        """The inputs of some sequences."""
        chosen = [None if value is None else value[index] for value in self.value_embeddings]
        return LoopInputs(self.e_BSD[index], chosen, self.rotary)


class ObservedRouting(NamedTuple):
    """Which experts the tokens went to in one core layer, and the router's scores, without gradient."""

    chosen_BSE: Tensor
    scores_BSE: Tensor


@dataclass(frozen=True)
class LoopState:
    """What each sequence carries from loop step to loop step; the first dimension of every tensor is the batch.

    ``loop_step_B`` counts a sequence's own loop steps; ``penalties_BP`` sums the two routing penalties (balance, z),
    in fp32, over the steps with gradient and the core's layers; ``routing`` has an entry for each core layer with
    experts, from the last observed step, and none before.
    """

    h_BSD: Tensor
    loop_step_B: Tensor
    penalties_BP: Tensor
    halting: HaltingState | None = None
    routing: tuple[ObservedRouting, ...] = ()

    def rows(self, index: Tensor) -> "LoopState":
        """The state of some sequences."""
        return LoopState(
            self.h_BSD[index],
            self.loop_step_B[index],
            self.penalties_BP[index],
            None if self.halting is None else HaltingState(*(tensor[index] for tensor in self.halting)),
            tuple(ObservedRouting(*(tensor[index] for tensor in layer)) for layer in self.routing),
        )

    def put(self, index: Tensor, part: "LoopState") -> "LoopState":
        """This state with ``part`` in the place of some sequences.

        Routing that only ``part`` has is zero for all other sequences.
        """
        halting = self.halting
        if halting is not None and part.halting is not None:
            halting = HaltingState(*_put(halting, index, part.halting))
        batch = len(self.h_BSD)
        routing = self.routing or tuple(
            ObservedRouting(*(tensor.new_zeros(batch, *tensor.shape[1:]) for tensor in layer)) for layer in part.routing
        )
        h_BSD, loop_step_B, penalties_BP = _put(
            (self.h_BSD, self.loop_step_B, self.penalties_BP), index, (part.h_BSD, part.loop_step_B, part.penalties_BP)
        )
        routing = tuple(
            ObservedRouting(*_put(before, index, layer)) for before, layer in zip(routing, part.routing, strict=True)
        )
        return LoopState(h_BSD, loop_step_B, penalties_BP, halting, routing)


class Loop(nn.Module):
    """h_{t+1} = core(inject(h_t, e)), T times; the last steps carry gradient.

    Shapes: h and e are (B, S, D). A sequence with a smaller T than others of its batch joins late, and all end
    together.

    This module is the unit that ZeRO-3 gathers as one leaf: its weights are gathered once forward and once backward,
    whatever T is. Therefore every use of its parameters, also for diagnostics, must be inside ``forward``.
    """

    def __init__(self, config: Looped, recompute: bool) -> None:
        super().__init__()
        experts, halting = config.core_experts, config.halting
        self.penalty_weights = {
            "train/balance_loss": experts.balance_loss if experts else 0.0,
            "train/router_z_loss": experts.router_z_loss if experts else 0.0,
            "train/ponder_loss": halting.ponder_weight if halting else 0.0,
        }
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

    def step(self, state: LoopState, inputs: LoopInputs, last: bool, observe: bool) -> LoopState:
        """One loop step. ``last``: no step follows; ``observe``: also record which experts each token goes to."""
        h_BSD = self.injection(state.h_BSD, inputs.e_BSD)
        if self.step_embedding is not None:
            row_B = state.loop_step_B.clamp(max=self.step_embedding.num_embeddings - 1)
            h_BSD = h_BSD + self.step_embedding(row_B)[:, None]
        penalties_BP, routing = state.penalties_BP, []
        for block, value in zip(self.core, inputs.value_embeddings, strict=True):
            output = block(h_BSD, inputs.rotary, value, state.loop_step_B, observe)
            h_BSD = output.x_BSD
            if output.penalties_BP is not None:
                penalties_BP = penalties_BP + output.penalties_BP
            if output.routing is not None:
                routing.append(ObservedRouting(output.routing.chosen_BSE, output.routing.scores_BSE.detach()))
        halting = state.halting
        if self.halting is not None and halting is not None:
            halting = self.halting(h_BSD, halting, last)
        return LoopState(h_BSD, state.loop_step_B + 1, penalties_BP, halting, tuple(routing) or state.routing)

    def forward(
        self,
        e_BSD: Tensor,
        value_embeddings: list[Tensor | None],
        rotary: tuple[Tensor, Tensor],
        plan: DepthPlan,
        exit_rule: ExitRule | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The final state, or its halting-weighted mean, (B, S, D); the penalties to add to the loss (3,); diagnostics.

        ``exit_rule`` may end the loop early, in evaluation.
        """
        inputs = LoopInputs(e_BSD, value_embeddings, rotary)
        state = self._initial_state(e_BSD, plan)
        with torch.no_grad():
            state, _, done_before = self._advance(state, inputs, plan.without_grad, plan.most_without_grad, False, None)
        # From here on the counters hold only the load of the steps with gradient; recomputation happens later.
        forget_load(moe_layers(self))
        state, previous, done = self._advance(state, inputs, plan.with_grad, plan.most_with_grad, True, exit_rule)
        output_BSD = state.h_BSD if state.halting is None else state.halting.weighted_mean(state.h_BSD)
        health = self._health(state, previous, plan)
        health["depth/done_over_due"] = Mean(done_before + done, sum(plan.without_grad) + sum(plan.with_grad))
        return output_BSD, self._penalties(state, plan), health

    def _initial_state(self, e_BSD: Tensor, plan: DepthPlan) -> LoopState:
        """h_0: zero, or normal noise like the embedding's, truncated at 3 deviations, from each sequence's own seed."""
        h_BSD = torch.zeros_like(e_BSD)
        if self.noise_deviation:
            generator = torch.Generator(e_BSD.device)
            limit = 3 * self.noise_deviation
            drawn_SD = torch.empty(e_BSD.shape[1:], device=e_BSD.device)  # fp32: bf16 would draw from a coarse grid
            for row_SD, seed in zip(h_BSD, plan.state_seeds, strict=True):
                nn.init.trunc_normal_(drawn_SD, 0.0, self.noise_deviation, -limit, limit, generator.manual_seed(seed))
                row_SD.copy_(drawn_SD)
        return LoopState(
            h_BSD,
            loop_step_B=torch.zeros(len(e_BSD), dtype=torch.long, device=e_BSD.device),
            penalties_BP=torch.zeros(len(e_BSD), 2, device=e_BSD.device),
            halting=None if self.halting is None else self.halting.start(e_BSD),
        )

    def _advance(
        self,
        state: LoopState,
        inputs: LoopInputs,
        steps: Sequence[int],
        most: int,
        final: bool,
        exit_rule: ExitRule | None,
    ) -> tuple[LoopState, LoopState, int]:
        """``most`` loop steps, each on the sequences that are due.

        Also returns the state before the last step and the number of loop steps done, summed over sequences.

        If no sequence is due, the step runs on an empty batch, so that the collectives of all processes match.
        """
        previous, done = state, 0
        for steps_left in range(most, 0, -1):
            previous = state
            last, observe = final and steps_left == 1, final and steps_left <= 2
            rows = due(steps, steps_left)
            done += len(rows)
            if len(rows) == len(steps):
                state = self._checkpointed_step(state, inputs, last, observe)
            else:
                index = torch.tensor(rows, dtype=torch.long, device=inputs.e_BSD.device)
                state = state.put(index, self._checkpointed_step(state.rows(index), inputs.rows(index), last, observe))
            if exit_rule is not None and exit_rule(previous.h_BSD, state.h_BSD, self._halted(state)):
                break
        return state, previous, done

    def _checkpointed_step(self, state: LoopState, inputs: LoopInputs, last: bool, observe: bool) -> LoopState:
        if self.recompute and torch.is_grad_enabled():
            # Reentrant recomputation of a loop gives silently wrong gradients under ZeRO-3: each loop step's backward
            # would reduce the shared weights' gradients again.
            return checkpoint(self.step, state, inputs, last, observe, use_reentrant=False, preserve_rng_state=False)
        return self.step(state, inputs, last, observe)

    def _halted(self, state: LoopState) -> Tensor | None:
        if self.halting is None or state.halting is None:
            return None
        return self.halting.halted(state.halting)

    def _penalties(self, state: LoopState, plan: DepthPlan) -> Tensor:
        """The penalties in the order of ``penalty_weights``, (3,), their weights included; 0 for one that is not used.

        Those of routing are averaged over sequences, their steps with gradient and the core's layers.
        """
        steps_B1 = torch.tensor(plan.with_grad, device=state.h_BSD.device)[:, None]
        routing_P = (state.penalties_BP / steps_B1).mean(dim=0) / len(self.core)
        ponder = routing_P.new_zeros(())
        if state.halting is not None:
            ponder = self.penalty_weights["train/ponder_loss"] * state.halting.ponder_BS.mean()
        penalties_P = torch.cat((routing_P, ponder[None]))
        if torch.is_grad_enabled() and not penalties_P.requires_grad:
            # The ponder cost has no gradient where all sequences of a rank have only one step with gradient. Then
            # ZeRO-3 would call this module's backward hooks less often than on other ranks.
            penalties_P.requires_grad_()
        return penalties_P

    @torch.no_grad()
    def _health(self, state: LoopState, previous: LoopState, plan: DepthPlan) -> dict[str, Mean]:
        norm = state.h_BSD.float().norm()
        health = {
            "loop/spectral_radius": Mean(self.injection.spectral_radius()),
            "loop/state_norm": Mean(norm / state.h_BSD[..., 0].numel() ** 0.5),
            "loop/state_change": Mean((state.h_BSD - previous.h_BSD).float().norm() / norm),
        }
        if state.halting is not None:
            health["loop/ponder"] = Mean(state.halting.ponder_BS.mean())
        if state.routing:
            shares = torch.stack(
                [layer.scores_BSE / layer.scores_BSE.sum(dim=-1, keepdim=True) for layer in state.routing]
            )
            health["moe/router_entropy"] = Mean(-(shares * shares.clamp(min=1e-20).log()).sum(dim=-1).mean())
            health["moe/choice_changed"] = _choice_changed(state, previous, plan)
        return health


def _choice_changed(state: LoopState, previous: LoopState, plan: DepthPlan) -> Mean:
    """Share of tokens that went to other experts at the last step than at the one before.

    Only sequences with two steps with gradient are compared.
    """
    deep_enough = torch.tensor(plan.with_grad, device=state.h_BSD.device) >= 2
    changed = [
        (now.chosen_BSE != before.chosen_BSE).any(dim=-1)[deep_enough].float().flatten()
        for now, before in zip(state.routing, previous.routing, strict=False)  # no step before: nothing was observed
    ]
    together = torch.cat(changed) if changed else state.h_BSD.new_zeros(0)
    return Mean(together.sum(), together.numel())


def _put(before: Sequence[Tensor], index: Tensor, part: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each tensor with the sequences ``index`` replaced."""
    return (tensor.index_copy(0, index, rows) for tensor, rows in zip(before, part, strict=True))
