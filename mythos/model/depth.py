"""How many loop steps each sequence gets: a plan that is computed outside the model, identically on every rank.

Ranks with different numbers of loop steps would hang, because the core's collectives (ZeRO-3 gathers, exchange of
tokens between experts) involve all of them. Therefore the loop runs as often as the deepest sequence of the micro-step
over all ranks, and shallower sequences join late.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos.config.depth_distribution import cumulative_distribution, mean_depth
from mythos.config.loop_schema import Loop
from mythos.random_streams import Purpose, philox

BLOCK_BITS = 6
BLOCK = 1 << BLOCK_BITS
"""So many neighbouring samples draw their depths together. Must never change: it defines the depths of old runs."""


@dataclass(frozen=True)
class DepthPlan:
    """Loop steps of the sequences of one rank's micro batch, deepest first, and the maxima over all ranks.

    ``order[row]`` is the place that the sequence of this row has in the caller's micro batch. ``state_seeds`` are the
    seeds of the sequences' initial states.
    """

    order: tuple[int, ...]
    without_grad: tuple[int, ...]
    with_grad: tuple[int, ...]
    most_without_grad: int
    most_with_grad: int
    state_seeds: tuple[int, ...]


def draw_depths(config: Loop, seed: int, step: int, samples: range) -> np.ndarray:
    """Loop steps of every sequence of the global batch, (sequences,): a pure function of its arguments.

    T = F^-1(u): the inverse of the depth's distribution function F, at a uniform number u for each sequence. The u are
    either independent or stratified: each is uniform, but of any 2^k <= ``BLOCK`` neighbours (from a multiple of 2^k)
    one is in each of the 2^k equal parts of [0, 1), so that every micro batch has nearly the same total.

    A sequence's u comes from its sample's number: not from the step, which a run repeats after a rewind with other
    samples, and not from its place in the batch, whose size may change.

    Args:
        step: number of the update, from 1; the curriculum's mean depends on it.
        samples: numbers of the batch's samples.
    """
    mean = mean_depth(config, step)
    if config.depth == "fixed":
        return np.full(len(samples), round(mean))
    if config.depth == "poisson_per_batch":
        uniform = np.full(len(samples), _generator(seed, samples.start).random())
    else:
        first, end = samples.start // BLOCK, -(-samples.stop // BLOCK)
        generators = [_generator(seed, block) for block in range(first, end)]
        blocks = [_stratified(each) if config.stratified else each.random(BLOCK) for each in generators]
        uniform = np.concatenate(blocks)[samples.start - first * BLOCK :][: len(samples)]
    return np.searchsorted(cumulative_distribution(config, mean), uniform, side="right")


def plan(depths: np.ndarray, backprop_depth: int, own: slice, state_seeds: Sequence[int]) -> DepthPlan:
    """The plan of one micro-step.

    Args:
        depths: loop steps of the micro-step's sequences on all ranks.
        backprop_depth: the last min(depth, backprop_depth) steps carry gradient.
        own: the rows of ``depths`` that this rank works on.
        state_seeds: of this rank's rows.
    """
    with_grad = np.minimum(depths, backprop_depth)
    without_grad = depths - with_grad
    order = np.argsort(-depths[own], kind="stable")
    return DepthPlan(
        order=tuple(order.tolist()),
        without_grad=tuple(without_grad[own][order].tolist()),
        with_grad=tuple(with_grad[own][order].tolist()),
        most_without_grad=int(without_grad.max()),
        most_with_grad=int(with_grad.max()),
        state_seeds=tuple(state_seeds[row] for row in order),
    )


def fixed(depth: int, sequences: int, state_seeds: Sequence[int] | None = None) -> DepthPlan:
    """``depth`` loop steps for every sequence, all of them with gradient unless it is switched off."""
    if depth < 1:
        raise ValueError(f"depth {depth}: must be at least 1")
    seeds = tuple(state_seeds or range(sequences))
    return DepthPlan(tuple(range(sequences)), (0,) * sequences, (depth,) * sequences, 0, depth, seeds)


def state_seed(seed: int, sample: int) -> int:
    """Seed of a sample's initial state. Samples are numbered by their position in the data stream."""
    return (seed * 0x9E3779B97F4A7C15 + sample) % 2**63


def due(steps: Sequence[int], steps_left: int) -> int:
    """How many sequences, from the deepest, take part when ``steps_left`` loop steps remain.

    All end together, shallow ones join late.
    """
    return sum(own_steps >= steps_left for own_steps in steps)


def _generator(seed: int, number: int) -> np.random.Generator:
    """Of a block of samples, or of a batch that begins with the sample ``number``."""
    return np.random.Generator(philox(Purpose.DEPTHS, seed, number))


def _stratified(generator: np.random.Generator) -> np.ndarray:
    """Bit-reversed indices (van der Corput) with Owen's scrambling, plus jitter: (scrambled + jitter) / BLOCK.

    Every binary digit is flipped at random, with one flip for each value of the preceding digits. Neighbours stay in
    different parts of [0, 1) and are placed independently within their parts.
    """
    scrambled = np.zeros(BLOCK, dtype=np.int64)
    prefix = np.zeros(BLOCK, dtype=np.int64)
    for level in range(BLOCK_BITS):
        digit = np.arange(BLOCK) >> level & 1
        flips = generator.integers(2, size=1 << level)
        scrambled |= (digit ^ flips[prefix]) << (BLOCK_BITS - 1 - level)
        prefix = prefix << 1 | digit
    return (scrambled + generator.random(BLOCK)) / BLOCK
