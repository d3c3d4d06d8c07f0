"""How often each sequence goes through the core: a plan that every rank computes alike, never drawn inside the model.

Ranks with different numbers of loop steps would hang, because the core's collectives (ZeRO-3 gathers, exchange of
tokens between experts) involve all of them. So the loop runs as often as the deepest sequence of the micro-step over
all ranks, and shallower sequences join late.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos.config.schema import Loop

DEPTH_COUNTER = [0, 0, 0, 1]
"""Where these draws start in the generator's sequence: far from those of the data order, which starts at 0."""


@dataclass(frozen=True)
class DepthPlan:
    """Loop steps of the sequences of one rank's micro batch, and the maxima over all ranks."""

    without_grad: tuple[int, ...]
    with_grad: tuple[int, ...]
    most_without_grad: int
    most_with_grad: int


def draw_depths(config: Loop, seed: int, step: int, sequences: int) -> np.ndarray:
    """Loop steps of every sequence of the global batch, (sequences,): a pure function of its arguments.

    Poisson draws are at least 1: T = max(1, Poisson(mean_depth)).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=DEPTH_COUNTER))
    match config.depth:
        case "fixed":
            return np.full(sequences, round(config.mean_depth))
        case "poisson_per_batch":
            return np.full(sequences, max(1, generator.poisson(config.mean_depth)))
        case "poisson_per_sequence":
            return np.maximum(1, generator.poisson(config.mean_depth, sequences))


def plan(depths: np.ndarray, backprop_depth: int, own: slice) -> DepthPlan:
    """The plan of one micro-step.

    Args:
        depths: loop steps of the micro-step's sequences on all ranks.
        backprop_depth: the last min(depth, backprop_depth) steps carry gradient.
        own: the rows of ``depths`` that this rank works on.
    """
    with_grad = np.minimum(depths, backprop_depth)
    without_grad = depths - with_grad
    return DepthPlan(
        without_grad=tuple(without_grad[own].tolist()),
        with_grad=tuple(with_grad[own].tolist()),
        most_without_grad=int(without_grad.max()),
        most_with_grad=int(with_grad.max()),
    )


def fixed(depth: int, sequences: int) -> DepthPlan:
    """Every sequence goes through the core ``depth`` times; for evaluation, where nothing carries gradient anyway."""
    return DepthPlan((0,) * sequences, (depth,) * sequences, 0, depth)


def due(steps: Sequence[int], steps_left: int) -> list[int]:
    """Sequences that take part when ``steps_left`` loop steps remain; all end together, the shallow ones join late."""
    return [i for i, own_steps in enumerate(steps) if own_steps >= steps_left]
