"""What an observation says, as the numbers that the report and its pictures show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mythos.config.model_schema import Dense, GroupedQuery, Latent, Looped
from mythos.config.schema import Config
from mythos.inspect.depth_law import LEAST_DEPTHS, DepthLaw, fit_depth
from mythos.inspect.observe import Observation
from mythos.plan.cache import cached_channels
from mythos.plan.flops import expected_steps, inference_flops, training_flops
from mythos.plan.params import count_parameters

GROUPS = 5
"""Of tokens by their frequency, and of positions."""
CACHE_ELEMENT_BYTES = 2
"""bf16, as a cache is usually kept."""


@dataclass(frozen=True)
class Gains:
    """How much each further loop step lowers the loss, (depths - 1, groups), in nats; NaN for an empty group."""

    names: tuple[str, ...]
    gain_TG: np.ndarray


@dataclass(frozen=True)
class Cache:
    """A kind of attention and the numbers that its cache keeps of a token and layer."""

    name: str
    channels: int


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


def caches(model: Looped | Dense) -> list[Cache]:
    """This model's attention beside multi-head, grouped-query and latent attention for the same heads.

    The latent is as large for a head as DeepSeek-V2's (arXiv 2405.04434): four heads for keys and values, and half a
    head for the rotated key.
    """
    own = model.attention
    heads, size = own.heads, own.head_size if isinstance(own, GroupedQuery) else own.value_head_size
    shared = next(each for each in (4, 2, 1) if heads % each == 0)
    usual = [
        Cache("multi-head", 2 * heads * size),
        Cache(f"grouped-query, {shared} heads a group", 2 * heads // shared * size),
        Cache("latent, 4 heads wide", 4 * size + size // 2),
    ]
    name = "latent" if isinstance(own, Latent) else f"grouped-query, {own.kv_heads} of {heads} heads"
    return [Cache(f"this model: {name}", cached_channels(own)), *usual]


def cost_rows(config: Config) -> list[tuple[str, str]]:
    """Parameters and FLOPs by the planner, for a table."""
    model, count = config.model, count_parameters(config.model)
    length = config.data.sequence_length
    depth = 0.0 if config.loop is None else config.loop.mean_depth
    training = training_flops(model, length, expected_steps(config.loop))
    layers = (
        model.layers
        if isinstance(model, Dense)
        else (model.prelude_layers + model.core_layers * round(depth) + model.coda_layers)
    )
    own = cached_channels(model.attention)
    return [
        ("parameters", f"{count.total:,}"),
        ("of which active for a token", f"{count.active:,}"),
        ("of which lookup tables", f"{count.tables:,}"),
        ("training GFLOP a token", f"{training / 1e9:.4g}"),
        ("inference GFLOP a token", f"{inference_flops(model, length, depth) / 1e9:.4g}"),
        ("layers that are run", f"{layers}"),
        ("cache of a token in bf16", f"{layers * own * CACHE_ELEMENT_BYTES:,} bytes"),
    ]


def figures(observation: Observation, gains: Sequence[tuple[str, Gains]]) -> dict[str, Any]:
    """All numbers that are drawn, for scripts."""
    law = depth_law(observation)
    found: dict[str, Any] = {
        "depths": list(observation.depths),
        "trained_depth": observation.trained_depth,
        "loss": mean_losses(observation).tolist(),
        "depth_law": None if law is None else {"floor": law.floor, "gain": law.gain, "rate": law.rate},
        "spectral_radius": observation.spectral_radius,
        "decay": None if observation.decay_D is None else observation.decay_D.tolist(),
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
        }
    for name, each in gains:
        found[f"gain_by_{name}"] = {"groups": list(each.names), "gain": each.gain_TG.tolist()}
    return found
