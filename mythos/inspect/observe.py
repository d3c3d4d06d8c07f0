"""What happens in a model on a sample of validation rows: losses by depth, the loop's state, routing and halting.

The model is the plain one, in one process. The loop is watched from outside: by the exit rule, which sees the state
before and after every loop step, and by hooks on the core's blocks and on the halting gate.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.eval.routing import watched_routing
from mythos.loss import IGNORED
from mythos.model import Model, depth
from mythos.model.halting import ACTHalting, HaltingState
from mythos.model.injection import LTIInjection
from mythos.model.moe import Routing
from mythos.model.transformer import LoopedTransformer


@dataclass(frozen=True)
class Sample:
    """Validation rows; ``targets_RS`` is ``IGNORED`` where a target does not count."""

    tokens_RS: np.ndarray
    targets_RS: np.ndarray
    seeds: tuple[int, ...]
    """Of each row's first loop state."""


@dataclass(frozen=True)
class StateTrace:
    """The loop's state on the way to the largest depth M, means over all tokens (root of the mean of squares).

    ``norm`` |h_t| per token and ``distance`` |h_t - h_M| / |h_M| for t = 0 ... M; ``change`` |h_t - h_t-1| / |h_t| for
    t = 1 ... M.
    """

    norm: np.ndarray
    change: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class RoutingTrace:
    """The experts of each core layer L at every loop step T = 1 ... M.

    ``load_LTE``: share of the tokens' choices, 1 over the experts. ``overlap_LTT``: share of a token's experts at one
    loop step that it also has at another. ``entropy_LT``: mean entropy of the normalised scores, in nats.
    """

    load_LTE: np.ndarray
    overlap_LTT: np.ndarray
    entropy_LT: np.ndarray


@dataclass(frozen=True)
class HaltingTrace:
    """Per token: ``step_N`` is the loop step at which it halts, at the latest M, where all do; ``ponder_N`` its ponder
    cost at the trained depth, and ``loss_N`` its loss there (NaN where it does not count)."""

    step_N: np.ndarray
    ponder_N: np.ndarray
    loss_N: np.ndarray


@dataclass(frozen=True)
class Observation:
    """All that was measured; the traces that a model has no parts for are None.

    ``losses_TRS`` has the loss of each token at each of ``depths`` in nats, NaN where it does not count; a dense model
    has one depth, 0.
    """

    depths: tuple[int, ...]
    trained_depth: int
    losses_TRS: np.ndarray
    state: StateTrace | None = None
    routing: RoutingTrace | None = None
    halting: HaltingTrace | None = None
    decay_D: np.ndarray | None = None
    """a of each channel of the injection; None if it has none."""
    spectral_radius: float | None = None


@dataclass
class _Watch:
    """Filled during one forward pass."""

    states: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    halting: list[HaltingState] = field(default_factory=list)

    def on_state(self, before_BSD: Tensor, after_BSD: Tensor, _: Tensor | None) -> Tensor:
        """An exit rule by which no sequence leaves."""
        if not self.states:
            self.states.append(before_BSD)
        self.states.append(after_BSD)
        return torch.zeros(len(after_BSD), dtype=torch.bool)


def depths_to_measure(trained: int, most: int) -> tuple[int, ...]:
    """Every depth up to 8, then steps of about a quarter, with the trained depth and the largest one."""
    found, next_depth = {trained, most}, 1
    while next_depth <= 0.85 * most:
        found.add(next_depth)
        next_depth += max(1, next_depth // 4)
    return tuple(sorted(found))


@torch.no_grad()
def observe(model: Model, sample: Sample, most: int, rows_at_once: int, device: torch.device) -> Observation:
    """Run the model on the sample at every depth of ``depths_to_measure``. ``most``: not used by a dense model."""
    if not isinstance(model, LoopedTransformer):
        losses_RS = np.concatenate([_losses(model, part, None, device) for part in _parts(sample, rows_at_once)])
        return Observation((0,), 0, losses_RS[None])
    trained, layers = model.mean_depth, len(model.loop.core)
    depths = depths_to_measure(trained, most)
    losses: dict[int, list[np.ndarray]] = {steps: [] for steps in depths}
    seen, halted, rows = [], [], []
    for part in _parts(sample, rows_at_once):
        watches = {}
        for steps in depths:
            with _watched(model) as watches[steps]:
                losses[steps].append(_losses(model, part, steps, device, watches[steps]))
            if steps not in (trained, most):
                del watches[steps]  # its states take memory
        deepest = watches[most]
        measured = [_squares(deepest.states), *(_routing(deepest) if deepest.chosen else ())]
        seen.append([each.double().cpu().numpy() for each in measured])
        rows.append(len(part.seeds))
        if isinstance(gate := model.loop.halting, ACTHalting):
            running = np.sum([(~gate.halted(state)).cpu().numpy() for state in deepest.halting], axis=0)
            ponder_BS = watches[trained].halting[-1].ponder_BS.cpu().numpy()
            halted.append([each.ravel() for each in (1 + running, ponder_BS, losses[trained][-1])])
    squares, *routing = [np.average(parts, axis=0, weights=rows) for parts in zip(*seen, strict=True)]
    injection = model.loop.injection
    return Observation(
        depths,
        trained,
        np.stack([np.concatenate(losses[steps]) for steps in depths]),
        _state_trace(squares),
        _routing_trace(layers, *routing) if routing else None,
        HaltingTrace(*(np.concatenate(each) for each in zip(*halted, strict=True))) if halted else None,
        injection.decay().cpu().numpy() if isinstance(injection, LTIInjection) else None,
        float(injection.spectral_radius()),
    )


def _squares(states: Sequence[Tensor]) -> Tensor:
    """Of each state h_t with its predecessor and the last one h_M: |h_t|^2, |h_t - h_t-1|^2 and |h_t - h_M|^2, means
    over the tokens, (M + 1, 3)."""
    rows = []
    for before, state in zip([states[0], *states], states, strict=False):
        differences = (state.float(), state.float() - before.float(), state.float() - states[-1].float())
        rows.append(torch.stack([each.square().sum(dim=-1).mean() for each in differences]))
    return torch.stack(rows)


def _routing(watch: _Watch) -> tuple[Tensor, Tensor, Tensor]:
    """Load (C, E), overlap (C, C) and entropy (C,), means over the tokens; C: each call of a layer, in order."""
    chosen_CNE = torch.stack(watch.chosen).flatten(1, 2).float()
    scores_CNE = torch.stack(watch.scores).flatten(1, 2)
    shares_CNE = scores_CNE / scores_CNE.sum(dim=-1, keepdim=True)
    entropy_C = -(shares_CNE * shares_CNE.clamp(min=1e-20).log()).sum(dim=-1).mean(dim=1)
    choices, tokens = chosen_CNE[0, 0].sum(), chosen_CNE.shape[1]
    overlap_CC = torch.einsum("cne,dne->cd", chosen_CNE, chosen_CNE) / (tokens * choices)
    return chosen_CNE.mean(dim=1) / choices, overlap_CC, entropy_C


def _state_trace(squares_T3: np.ndarray) -> StateTrace:
    norm_T, change_T, distance_T = np.sqrt(squares_T3).T
    return StateTrace(norm_T, change_T[1:] / norm_T[1:], distance_T / norm_T[-1])


def _routing_trace(layers: int, load_CE: np.ndarray, overlap_CC: np.ndarray, entropy_C: np.ndarray) -> RoutingTrace:
    """The calls told apart: all layers of the first loop step, then those of the second, and so on."""
    steps = len(load_CE) // layers
    overlap_TLTL = overlap_CC.reshape(steps, layers, steps, layers)
    return RoutingTrace(
        load_CE.reshape(steps, layers, -1).swapaxes(0, 1),
        np.stack([overlap_TLTL[:, layer, :, layer] for layer in range(layers)]),
        entropy_C.reshape(steps, layers).T,
    )


def _parts(sample: Sample, rows_at_once: int) -> Iterator[Sample]:
    for first in range(0, len(sample.seeds), rows_at_once):
        part = slice(first, first + rows_at_once)
        yield Sample(sample.tokens_RS[part], sample.targets_RS[part], sample.seeds[part])


def _losses(
    model: Model, part: Sample, steps: int | None, device: torch.device, watch: _Watch | None = None
) -> np.ndarray:
    """The loss of each token, (rows, S), NaN where it does not count."""
    tokens_BS = torch.from_numpy(part.tokens_RS).to(device)
    targets_BS = torch.from_numpy(part.targets_RS).to(device)
    if steps is None or watch is None:
        logits_BSV = model(tokens_BS)
    else:
        plan = depth.fixed(steps, len(part.seeds), part.seeds)
        logits_BSV = model(tokens_BS, None, plan, watch.on_state)
    losses_BS = torch.full(targets_BS.shape, torch.nan, device=device)
    for row, logits_SV in enumerate(logits_BSV):  # in fp32 one row at a time
        counts = targets_BS[row] != IGNORED
        losses_BS[row, counts] = F.cross_entropy(logits_SV[counts].float(), targets_BS[row, counts], reduction="none")
    return losses_BS.cpu().numpy()


@contextmanager
def _watched(model: LoopedTransformer) -> Iterator[_Watch]:
    """A watch on one forward pass of the model."""
    watch = _Watch()

    def routed(routing: Routing) -> None:
        watch.chosen.append(routing.chosen_BSE)
        watch.scores.append(routing.scores_BSE)

    with ExitStack() as cleanup:
        cleanup.enter_context(watched_routing(model.loop.core, routed))
        if model.loop.halting is not None:
            handle = model.loop.halting.register_forward_hook(lambda _, __, state: watch.halting.append(state))
            cleanup.callback(handle.remove)
        yield watch
