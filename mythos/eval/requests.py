"""The log-probability of given tokens: micro batches of similar length, shared out over the ranks.

    log p(x_first ... x_n | x_0 ... x_first-1) = sum_i log p(x_i | x_0 ... x_i-1)

An input is padded on the right, where no token of a causal model sees it, to a length that depends on its own length
alone. So its result depends neither on the other requests nor on the batch or the ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mythos.model import Forward, depth

SMALLEST_INPUT = 16
LENGTHS_PER_OCTAVE = 4
SHARED_TOKENS = 1 << 22
"""Requests that are worked on together have about so many tokens."""


@dataclass(frozen=True)
class Request:
    """Tokens, of which those from number ``first`` (at least 1) on are scored.

    ``state_seed`` is the seed of the initial state of a looped model.
    """

    tokens: np.ndarray
    first: int
    state_seed: int = 0


class Score(NamedTuple):
    """Of one request: log p of each scored token in nats, and whether each is the likeliest."""

    log_probabilities: np.ndarray
    is_greedy: bool


Scorer = Callable[[Sequence[Request]], list[Score]]
"""A model at one depth."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue by a number of tokens, at a temperature."""

    ids: list[int]
    tokens: int
    temperature: float


Writer = Callable[[Prompt], list[int]]
"""A model at one depth: returns the prompt and its continuation."""


def windows(tokens: Sequence[int] | np.ndarray, first: int, longest: int, state_seed: int = 0) -> list[Request]:
    """Requests that score each token from number ``first`` on once, with inputs of at most ``longest`` tokens.

    The last window has all the context that fits, and the ones before it score ``longest`` tokens each. If what is
    scored fits into one window, its context is cut on the left. No window if nothing is to be scored.
    """
    ids, found = np.asarray(tokens, dtype=np.int32), []
    while first < len(ids):
        end = min(first + longest, len(ids))
        begin = max(0, end - longest - 1)
        found.append(Request(ids[begin:end], first - begin, state_seed))
        first = end
    return found


def score(
    forward: Forward,
    requests: Sequence[Request],
    steps: int | None,
    micro_batch_tokens: int,
    longest: int,
    device: torch.device,
) -> list[Score]:
    """The scores of all requests, which every rank knows; the same on all ranks. Collective.

    Args:
        forward: called without targets: returns logits.
        steps: loop steps; None for a dense model.
        micro_batch_tokens: inputs of one forward pass have together at most so many tokens, or there is one.
        longest: of the inputs.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scored = [len(request.tokens) - request.first for request in requests]
    ends = np.cumsum(scored, dtype=np.int64)
    of_tokens = torch.zeros(sum(scored), dtype=torch.float64, device=device)
    greedy = torch.zeros(len(requests), dtype=torch.float64, device=device)
    for length, batch in _batches(
        [len(request.tokens) - 1 for request in requests], micro_batch_tokens, longest, ranks
    ):
        rows = -(-len(batch) // ranks)
        own = batch[rank * rows : (rank + 1) * rows]
        filled = [*own, *[batch[-1]] * (rows - len(own))]  # every rank works on equally many rows
        inputs, seeds = torch.zeros(rows, length, dtype=torch.long), [requests[i].state_seed for i in filled]
        for row, number in zip(inputs, filled, strict=True):
            row[: len(requests[number].tokens) - 1] = torch.from_numpy(requests[number].tokens[:-1])
        plan = None if steps is None else depth.fixed(steps, rows, seeds)
        logits_BSV = forward(inputs.to(device), None, plan)
        for logits_SV, number in zip(logits_BSV, own, strict=False):
            of_tokens[ends[number] - scored[number] : ends[number]], greedy[number] = _scores(
                logits_SV, requests[number]
            )
    if dist.is_initialized():
        for shared in (of_tokens, greedy):
            dist.all_reduce(shared)  # each element is zero on all ranks but one, so nothing is rounded
    parts = np.split(of_tokens.cpu().numpy(), ends[:-1]) if requests else []
    return [Score(part, bool(flag)) for part, flag in zip(parts, greedy.tolist(), strict=True)]


def in_parts(requests: Sequence[Request], tokens: int = SHARED_TOKENS) -> Iterator[Sequence[Request]]:
    """The requests in order, in parts with about so many tokens."""
    start = size = 0
    for number, request in enumerate(requests):
        size += len(request.tokens)
        if size >= tokens or number == len(requests) - 1:
            yield requests[start : number + 1]
            start, size = number + 1, 0


def padded_length(tokens: int, longest: int) -> int:
    """The length to which an input is padded: one of a few in each octave, so that little is wasted."""
    step = max(SMALLEST_INPUT, (1 << (tokens - 1).bit_length()) // (2 * LENGTHS_PER_OCTAVE))
    return min(longest, -(-tokens // step) * step)


def _batches(lengths: Sequence[int], tokens: int, longest: int, ranks: int) -> Iterator[tuple[int, list[int]]]:
    """Padded length and numbers of the inputs of one micro batch of all ranks; the longest first."""

    def padded(number: int) -> int:
        return padded_length(lengths[number], longest)

    order = sorted(range(len(lengths)), key=lambda number: (-padded(number), number))
    for length, numbers in groupby(order, padded):
        group, at_once = list(numbers), max(1, tokens // length) * ranks
        for start in range(0, len(group), at_once):
            yield length, group[start : start + at_once]


def _scores(logits_SV: Tensor, request: Request) -> tuple[Tensor, float]:
    targets_T = torch.from_numpy(request.tokens[request.first :]).long().to(logits_SV.device)
    logits_TV = logits_SV[request.first - 1 : len(request.tokens) - 1]
    log_probabilities_T = -F.cross_entropy(logits_TV.float(), targets_T, reduction="none")
    return log_probabilities_T.double(), float((logits_TV.argmax(dim=-1) == targets_T).all())
