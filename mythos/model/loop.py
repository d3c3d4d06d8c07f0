"""The recurrent core: one set of weights, run as often as the depth plan requires."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.config.loop_schema import Loop as LoopOptions
from mythos.config.model_schema import Looped, has_value_embedding
from mythos.loss import Mean
from mythos.model.block import CoreBlock
from mythos.model.cache import NewTokens
from mythos.model.depth import DepthPlan, due
from mythos.model.halting import ACTHalting
from mythos.model.injection import build_injection
from mythos.model.moe import forget_load, moe_layers
from mythos.model.rules import initial_deviation
from mythos.model.state import LoopInputs, LoopState, ObservedRouting

RESIDUAL_EXPONENT = {"none": 0.0, "loops": 1.0, "root_loops": 0.5}
"""What the core's layers add is divided by the mean depth to this power. With shared weights the steps' contributions
add up like their number, not like its root (arXiv 2606.18524)."""
NOISE_LIMIT = 3
"""Standard deviations at which the noise of the first state is cut."""
ExitRule = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(state before, state after, which tokens have halted or None) -> which sequences (B,) need no more loop steps.

For evaluation, where the loop ends when none needs more; in generation each sequence leaves it by itself. Processes
that share experts must all decide the same.
"""


class Loop(nn.Module):
    """h_{t+1} = core(inject(h_t, e)), T times; the last steps carry gradient.

    Shapes: h and e are (B, S, D), the deepest sequences first, so that those which are due at a step are a slice. A
    sequence with a smaller T than others of its batch joins late, and all end together.

    This module is the unit that ZeRO-3 gathers as one leaf: its weights are gathered once forward and once backward,
    whatever T is. Therefore every use of its parameters, also for diagnostics, must be inside ``forward``.
    """

    def __init__(self, config: Looped, options: LoopOptions) -> None:
        super().__init__()
        experts, halting = config.core_experts, config.halting
        self.penalty_weights = {
            "train/balance_loss": experts.balance_loss if experts else 0.0,
            "train/router_z_loss": experts.router_z_loss if experts else 0.0,
            "train/ponder_loss": halting.ponder_weight if halting else 0.0,
        }
        self.recompute = options.recompute is True  # auto: the engine decides
        self.exchanges_tokens = experts is not None
        self.noise_deviation = initial_deviation(config.width) if config.initial_state == "noise" else 0.0
        self.injection = build_injection(config)
        layers = config.prelude_layers + config.core_layers + config.coda_layers
        scale = options.mean_depth ** -RESIDUAL_EXPONENT[config.residual_scaling]
        self.core = nn.ModuleList(
            CoreBlock(config, has_value_embedding(config, config.prelude_layers + layer, layers), scale)
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
        caches = inputs.caches or [None] * len(self.core)
        for block, value, cache in zip(self.core, inputs.value_embeddings, caches, strict=True):
            output = block(h_BSD, inputs.rotary, value, cache, state.loop_step_B, observe)
            h_BSD = output.x_BSD
            if output.penalties_BP is not None:
                penalties_BP = penalties_BP + output.penalties_BP
            if output.routing is not None:
                routing.append(ObservedRouting(output.routing.chosen_BSE, output.routing.scores_BSE.detach()))
        halting = state.halting
        if self.halting is not None and halting is not None:
            halting = self.halting(h_BSD, halting, last)
        return LoopState(h_BSD, state.loop_step_B + 1, penalties_BP, halting, tuple(routing))

    def forward(
        self,
        e_BSD: Tensor,
        value_embeddings: list[Tensor | None],
        rotary: tuple[Tensor, Tensor],
        plan: DepthPlan,
        exit_rule: ExitRule | None = None,
        new: NewTokens | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The final state, or its halting-weighted mean, (B, S, D); the penalties to add to the loss (3,); diagnostics.

        All sequences are in the plan's order. ``exit_rule`` may end the loop early, in evaluation.
        """
        inputs = LoopInputs(e_BSD, value_embeddings, rotary)
        if new is not None:
            return self._generate(inputs, new, exit_rule), e_BSD.new_zeros(len(self.penalty_weights)), {}
        start = self._initial_state(e_BSD, plan)
        with torch.no_grad():
            none = start.rows(0, 0)
            steps, most = plan.without_grad, plan.most_without_grad
            state, _, done_before = self._advance(none, start, inputs, steps, most, False, None)
        # From here on the counters hold only the load of the steps with gradient; recomputation happens later.
        forget_load(moe_layers(self))
        steps, most = plan.with_grad, plan.most_with_grad
        state, previous, done = self._advance(state, start, inputs, steps, most, True, exit_rule)
        health = self._health(state, previous)
        health["depth/done_over_due"] = Mean(done_before + done, sum(plan.without_grad) + sum(plan.with_grad))
        state = state.followed_by(start.rows(len(state), len(start)))  # an early exit leaves sequences at their start
        return state.output(), self._penalties(state, plan), health

    def _generate(self, inputs: LoopInputs, new: NewTokens, exit_rule: ExitRule | None) -> Tensor:
        """The output of new tokens. With a rule, a sequence leaves the loop when it needs no more steps.

        Prompts, whose entries all later tokens see, always get all steps.
        """
        e_BSD, cache, outputs_BSD = inputs.e_BSD, new.cache, torch.empty_like(inputs.e_BSD)
        state = self._start(e_BSD, self._noise(e_BSD, cache.noise, cache.counts))
        for step in range(cache.depth):
            last = step == cache.depth - 1
            before, state = state, self.step(state, replace(inputs, caches=new.core(step)), last, False)
            if last or exit_rule is None or new.sees_B1SL is None:
                continue
            done_B = exit_rule(before.h_BSD, state.h_BSD, self._halted(state))
            if not done_B.any():
                continue
            done_b, left_b = done_B.nonzero()[:, 0], (~done_B).nonzero()[:, 0]
            outputs_BSD[new.rows_B[done_b]] = state.of(done_b).output()
            new.of(done_b).leave_loop(step + 1)
            state, new = state.of(left_b), new.of(left_b)
            inputs = inputs.of(left_b, new.rotary)
            if not len(left_b):
                return outputs_BSD
        if len(state) == len(outputs_BSD):
            return state.output()
        outputs_BSD[new.rows_B] = state.output()
        return outputs_BSD

    def _initial_state(self, e_BSD: Tensor, plan: DepthPlan) -> LoopState:
        """h_0 of sequences that begin, each from its own seed."""
        generator = torch.Generator(e_BSD.device)
        return self._start(e_BSD, self._noise(e_BSD, (generator.manual_seed(seed) for seed in plan.state_seeds)))

    def _noise(self, e_BSD: Tensor, streams: Iterable[torch.Generator], tokens: Sequence[int] | None = None) -> Tensor:
        """h_0: zero, or normal noise like the embedding's, truncated at 3 deviations, from each sequence's stream.

        sqrt(2) erf^-1(u), u uniform in (-p, p) with p = erf(3 / sqrt(2)), is such noise for deviation 1. Unlike
        torch's ``trunc_normal_``, which rejects and repeats, it never waits for the device. Of ``tokens`` the pads that
        follow stay zero. On a CPU, tokens that are drawn one after the other get the noise of those drawn together.
        """
        h_BSD = torch.zeros_like(e_BSD, dtype=torch.float32)  # bf16 would draw from a coarse grid
        if self.noise_deviation:
            limit = math.erf(NOISE_LIMIT / math.sqrt(2))
            counts = tokens or [e_BSD.shape[1]] * len(e_BSD)
            for row_SD, count, stream in zip(h_BSD, counts, streams, strict=True):
                row_SD[:count].uniform_(-limit, limit, generator=stream)
            h_BSD.erfinv_().mul_(self.noise_deviation * math.sqrt(2))
        return h_BSD.type_as(e_BSD)

    def _start(self, e_BSD: Tensor, h_BSD: Tensor) -> LoopState:
        return LoopState(
            h_BSD,
            loop_step_B=torch.zeros(len(e_BSD), dtype=torch.long, device=e_BSD.device),
            penalties_BP=torch.zeros(len(e_BSD), 2, device=e_BSD.device),
            halting=None if self.halting is None else self.halting.start(e_BSD),
        )

    def _advance(
        self,
        state: LoopState,
        start: LoopState,
        inputs: LoopInputs,
        steps: Sequence[int],
        most: int,
        final: bool,
        exit_rule: ExitRule | None,
    ) -> tuple[LoopState, LoopState, int]:
        """``most`` loop steps, each on the sequences that are due: those of ``state`` and, joining, some of ``start``.

        Also returns the state before the last step and the number of loop steps done, summed over sequences.

        If no sequence is due, a core with experts runs on an empty batch, so that the collectives of all processes
        match.
        """
        previous, done = state, 0
        for steps_left in range(most, 0, -1):
            last, observe = final and steps_left == 1, final and steps_left <= 2 and self.exchanges_tokens
            rows = due(steps, steps_left)
            done += rows
            previous = state = state.followed_by(start.rows(len(state), rows))
            if rows or self.exchanges_tokens:
                state = self._checkpointed_step(state, inputs.first(rows), last, observe)
            if exit_rule is not None and exit_rule(previous.h_BSD, state.h_BSD, self._halted(state)).all():
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
        # The copy of so few numbers does not wait for the device.
        steps_B1 = torch.tensor(plan.with_grad)[:, None].to(state.h_BSD.device, non_blocking=True)
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
    def _health(self, state: LoopState, previous: LoopState) -> dict[str, Mean]:
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
            health["moe/choice_changed"] = _choice_changed(state, previous)
        return health


def _choice_changed(state: LoopState, previous: LoopState) -> Mean:
    """Share of tokens that went to other experts at the last step than at the one before.

    Only sequences with two steps with gradient are compared.
    """
    changed = [
        (now.chosen_BSE[: len(before.chosen_BSE)] != before.chosen_BSE).any(dim=-1)
        for now, before in zip(state.routing, previous.routing, strict=False)  # no step before: nothing was observed
    ]
    if not changed:
        return Mean(0.0, 0)
    together = torch.stack(changed)
    return Mean(together.sum(), together.numel())
