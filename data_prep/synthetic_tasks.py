"""Synthetic tasks whose answer needs many steps in a row, as problems and answers of symbols.

p_hop: a sequence, then p times `>`. From its last symbol go back to where that symbol stood before, take the symbol
    after it, and so on, p times; the answer is the symbol reached (Sanford et al. 2024, arXiv 2402.09268). No symbol
    follows itself, so that every hop goes back.
addition: two numbers of n digits. The answer is their sum in n + 1 digits, most significant digit first.
permutations: n permutations of five things, carried out from left to right. The answer is the one permutation that
    does the same (the word problem of S5, Barrington 1989).

The difficulty is p or n. On such tasks a k-layer block that is looped L times is compared with kL layers (Saunshi et
al. 2025, arXiv 2502.17416).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LETTERS = "abcd"
HOP = ">"
SYMBOLS_PER_HOP, LEAST_SYMBOLS = 4, 12
PERMUTATIONS = list(itertools.permutations(range(5)))


class Problem(NamedTuple):
    """The symbols of a problem and of its answer."""

    question: list[str]
    answer: list[str]


@dataclass(frozen=True)
class Task:
    """A family of problems."""

    symbols: tuple[str, ...]
    make: Callable[[np.random.Generator, int, int], Problem]
    """(random, difficulty, highest difficulty of the data set) -> a problem."""
    longest: Callable[[int, int], int]
    """(difficulty, highest difficulty) -> symbols of a problem with its answer."""


def p_hop(random: np.random.Generator, hops: int, most: int) -> Problem:
    """The sequence is as long for few hops as for ``most``, so that its length says nothing about the answer."""
    length = LEAST_SYMBOLS + SYMBOLS_PER_HOP * most
    while True:
        # Each symbol is one of the others than the one before it: a step of 1, 2 or 3 around the circle.
        steps = random.integers(1, len(LETTERS), length)
        sequence = np.cumsum(steps) % len(LETTERS)
        place = _hop(sequence, hops)
        if place is not None:
            return Problem([LETTERS[symbol] for symbol in sequence] + [HOP] * hops, [LETTERS[sequence[place]]])


def _hop(sequence: np.ndarray, hops: int) -> int | None:
    """The place that is reached from the last one; None if a symbol has no previous occurrence."""
    place = len(sequence) - 1
    for _ in range(hops):
        before = np.flatnonzero(sequence[:place] == sequence[place])
        if not len(before):
            return None
        place = int(before[-1]) + 1
    return place


def addition(random: np.random.Generator, digits: int, most: int) -> Problem:
    """Numbers may begin with zeros."""
    first, second = random.integers(10, size=(2, digits))
    total = _number(first) + _number(second)
    return Problem([*map(str, first), "+", *map(str, second)], list(str(total).zfill(digits + 1)))


def _number(digits: np.ndarray) -> int:
    return int("".join(map(str, digits)))


def permutations(random: np.random.Generator, factors: int, most: int) -> Problem:
    """The symbol 20134 puts thing 2 in the first place, thing 0 in the second and so on."""
    chosen = [PERMUTATIONS[number] for number in random.integers(len(PERMUTATIONS), size=factors)]
    product: tuple[int, ...] = tuple(range(5))
    for factor in chosen:
        product = tuple(product[place] for place in factor)
    return Problem([_symbol(factor) for factor in chosen], [_symbol(product)])


def _symbol(permutation: tuple[int, ...]) -> str:
    return "".join(map(str, permutation))


TASKS = {
    "p_hop": Task((*LETTERS, HOP), p_hop, lambda hops, most: LEAST_SYMBOLS + SYMBOLS_PER_HOP * most + hops + 1),
    "addition": Task((*map(str, range(10)), "+"), addition, lambda digits, most: 3 * digits + 2),
    "permutations": Task(tuple(map(_symbol, PERMUTATIONS)), permutations, lambda factors, most: factors + 1),
}
