"""What an observation says, as the numbers that the report and its pictures show."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np

from mythos.config.derive import whole_mean_depth
from mythos.config.model_schema import CACHE_BLOCK_TOKENS, Dense, GroupedQuery, Latent
from mythos.config.schema import Config
from mythos.inspect.depth_law import LEAST_DEPTHS, DepthLaw, fit_depth
from mythos.inspect.observe import HaltingTrace, Observation
from mythos.plan.cache import cache_bytes
from mythos.plan.flops import expected_steps, inference_flops, training_flops
from mythos.plan.params import count_parameters

GROUPS = 5
"""Of tokens by their frequency, and of positions."""
PONDER_GROUPS = 10
CACHE_ELEMENT_BYTES = 2
"""bf16, as a cache is usually kept."""


@dataclass(frozen=True)
class Gains:
    """How much each further loop step lowers the loss, (depths - 1, groups), in nats; NaN for an empty group."""

    names: tuple[str, ...]
    gain_TG: np.ndarray


@dataclass(frozen=True)
class PonderGroups:
    """Tokens in at most ten groups of about equal size by their ponder cost: means of the cost and of the loss."""

    tokens: np.ndarray
    ponder: np.ndarray
    loss: np.ndarray
    standard_error: np.ndarray
    """Of the mean loss."""


@dataclass(frozen=True)
class Cost:
    """What a kind of attention makes of the model: all parameters, and of a token FLOPs at inference and cache."""

    name: str
    parameters: int
    inference_flops: float
    cache_bytes: int


def mean_losses(observation: Observation) -> np.ndarray:
    """The mean loss at each depth, (depths,)."""
    means: np.ndarray = np.nanmean(observation.losses_TRS, axis=(1, 2))
    return means


def depth_law(observation: Observation) -> DepthLaw | None:
    """The law through the losses up to the trained depth and beyond; None for too few depths."""
    if len(observation.depths) < LEAST_DEPTHS:
        return None
    return fit_depth(np.array(observation.depths), mean_losses(observation))


def gains_by_frequency(observation: Observation, targets_RS: np.ndarray, counts_V: np.ndarray) -> Gains:
    """By how often the target token is in the data: groups of equal share of the text, the most frequent first.

    Args:
        counts_V: how often each id is in the data.
    """
    order = np.argsort(-counts_V, kind="stable")
    before_V = np.empty(len(counts_V))
    before_V[order] = np.cumsum(counts_V[order]) - counts_V[order]  # of the text: more frequent tokens
    group_V = np.minimum(GROUPS * before_V // max(counts_V.sum(), 1), GROUPS - 1).astype(int)
    names = []
    for group in range(GROUPS):
        ids = int(((group_V == group) & (counts_V > 0)).sum())
        names.append(f"{ids:,} tokens" if ids != 1 else "1 token")
    return Gains(tuple(names), _gains(observation, group_V[np.clip(targets_RS, 0, len(group_V) - 1)]))


def gains_by_position(observation: Observation) -> Gains:
    """By the position in the row."""
    _, rows, length = observation.losses_TRS.shape
    edges = [round(length * group / GROUPS) for group in range(GROUPS + 1)]
    group_S = np.searchsorted(edges[1:-1], np.arange(length), side="right")
    names = tuple(f"{first}-{end - 1}" for first, end in pairwise(edges))
    return Gains(names, _gains(observation, np.broadcast_to(group_S, (rows, length))))


def _gains(observation: Observation, group_RS: np.ndarray) -> np.ndarray:
    losses_TRS = observation.losses_TRS
    means = [
        [np.nanmean(loss_RS[group_RS == group]) if (group_RS == group).any() else math.nan for group in range(GROUPS)]
        for loss_RS in losses_TRS
    ]
    gains: np.ndarray = -np.diff(np.array(means), axis=0)
    return gains


def ponder_groups(halting: HaltingTrace) -> PonderGroups:
    """Of the tokens that count in the loss. The groups meet at the tenths of the ponder costs."""
    counted_N = ~np.isnan(halting.loss_N)
    ponder_N, loss_N = halting.ponder_N[counted_N], halting.loss_N[counted_N]
    inner_edges = np.unique(np.quantile(ponder_N, np.linspace(0, 1, PONDER_GROUPS + 1)))[1:-1]
    group_N = np.searchsorted(inner_edges, ponder_N, side="right")
    groups = [group_N == one for one in np.unique(group_N)]
    return PonderGroups(
        tokens=np.array([each.sum() for each in groups]),
        ponder=np.array([ponder_N[each].mean() for each in groups]),
        loss=np.array([loss_N[each].mean() for each in groups]),
        standard_error=np.array([loss_N[each].std() / math.sqrt(each.sum()) for each in groups]),
    )


def costs(config: Config) -> list[Cost]:
    """This model, and the same model with multi-head, grouped-query and latent attention for as many heads of its size.

    The latents have the proportions of DeepSeek-V2's (arXiv 2405.04434): keys and values four heads wide, queries
    twelve, at most the model's width, and a rotated key of half a head.
    """
    own: Any = config.model.attention
    gqa, mla = cast(Any, GroupedQuery), cast(Any, Latent)  # mypy does not know the arguments of sections
    size = own.head_size if isinstance(own, GroupedQuery) else own.value_head_size + own.value_head_size % 2
    shared = next(each for each in (4, 2, 1) if own.heads % each == 0)
    plain = gqa(kind="gqa", heads=own.heads, kv_heads=own.heads, head_size=size)
    if isinstance(own, GroupedQuery):
        plain = replace(cast(Any, own), kv_heads=own.heads)
    latent = mla(
        kind="mla",
        heads=own.heads,
        query_latent_size=min(12 * size, config.model.width),
        key_value_latent_size=4 * size,
        content_head_size=size,
        rotary_head_size=2 * (size // 4),
        value_head_size=size,
    )
    name = "latent" if isinstance(own, Latent) else f"grouped-query, {own.kv_heads} of {own.heads} heads"
    usual = [
        ("multi-head", plain),
        (f"grouped-query, {own.heads // shared} of {own.heads} heads", replace(plain, kv_heads=own.heads // shared)),
        ("latent, 4 heads wide", latent),
    ]
    others = [(other, attention) for other, attention in usual if attention != own]
    return [_cost(each, attention, config) for each, attention in ((f"this model: {name}", own), *others)]


def _cost(name: str, attention: GroupedQuery | Latent, config: Config) -> Cost:
    """By the planner, at the mean depth of training."""
    own: Any = config.model
    model, depth = replace(own, attention=attention), whole_mean_depth(config) or 0
    return Cost(
        name,
        count_parameters(model).total,
        inference_flops(model, config.data.sequence_length, depth),
        cache_bytes(model, depth, CACHE_BLOCK_TOKENS, CACHE_ELEMENT_BYTES) // CACHE_BLOCK_TOKENS,
    )


def cost_rows(config: Config) -> list[tuple[str, str]]:
    """What the attention does not change, for a table."""
    model, count = config.model, count_parameters(config.model)
    depth = whole_mean_depth(config) or 0
    training = training_flops(model, config.data.sequence_length, expected_steps(config.loop))
    layers = (
        model.layers
        if isinstance(model, Dense)
        else (model.prelude_layers + model.core_layers * depth + model.coda_layers)
    )
    return [
        ("parameters that are active for a token", f"{count.active:,}"),
        ("of which lookup tables", f"{count.tables:,}"),
        ("training GFLOP a token", f"{training / 1e9:.4g}"),
        ("layers that are run", f"{layers}"),
    ]


def figures(observation: Observation, gains: Sequence[tuple[str, Gains]], config: Config) -> dict[str, Any]:
    """All numbers that are drawn, for scripts."""
    law = depth_law(observation)
    found: dict[str, Any] = {
        "depths": list(observation.depths),
        "trained_depth": observation.trained_depth,
        "loss": mean_losses(observation).tolist(),
        "depth_law": None if law is None else {"floor": law.floor, "gain": law.gain, "rate": law.rate},
        "spectral_radius": observation.spectral_radius,
        "decay": None if observation.decay_D is None else observation.decay_D.tolist(),
        "cost": [asdict(each) for each in costs(config)],
    }
    if observation.state is not None:
        found["state"] = {name: values.tolist() for name, values in vars(observation.state).items()}
    if observation.routing is not None:
        found["routing"] = {name: values.tolist() for name, values in vars(observation.routing).items()}
    if observation.halting is not None:
        steps, tokens = np.unique(observation.halting.step_N, return_counts=True)
        found["halting"] = {
            "tokens_by_step": dict(zip(map(str, steps.tolist()), tokens.tolist(), strict=True)),
            "mean_ponder": float(observation.halting.ponder_N.mean()),
            "ponder_groups": {name: each.tolist() for name, each in vars(ponder_groups(observation.halting)).items()},
        }
    for name, each in gains:
        found[f"gain_by_{name}"] = {"groups": list(each.names), "gain": each.gain_TG.tolist()}
    return found
