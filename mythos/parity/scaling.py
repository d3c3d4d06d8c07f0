"""Laws of the loss over parameters, tokens and loop steps, fitted to runs.

    chinchilla:  L(N, D)    = E + A N^-a + B D^-b                (Hoffmann et al. 2022, arXiv 2203.15556)
    recurrence:  L(N, D, R) = E + A N^-a + B D^-b + C R^-c       R: mean loop steps in training (after arXiv 2604.12946)

The coefficients are positive, so they are fitted as logarithms; N, D and R are divided by their geometric means, which
makes coefficients and exponents nearly independent. The residual is that of log L, with Huber's loss (delta 1e-3), as
in arXiv 2203.15556: a run that has diverged does not bend the law. Several starts, the best result counts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from mythos.errors import UserError

HUBER_DELTA = 1e-3
BOOTSTRAPS = 200
TAILS = (0.025, 0.975)
EXPONENTS = (0.15, 0.35, 0.7)
"""Of the starts; for each, the loss above E is divided evenly among the terms."""
LARGEST_EXPONENT = 5.0
FLOORS = (0.3, 0.6, 0.9)
"""Of the starts: E relative to the lowest loss."""


@dataclass(frozen=True)
class PowerLaw:
    """L = E + sum over the variables x of coefficient (x / scale)^-exponent."""

    variables: tuple[str, ...]
    floor: float
    coefficients: np.ndarray
    exponents: np.ndarray
    scales: np.ndarray

    def loss(self, points_PV: np.ndarray) -> np.ndarray:
        """The loss at points (points, variables), (points,)."""
        return self.floor + ((points_PV / self.scales) ** -self.exponents) @ self.coefficients

    def exponent(self, variable: str) -> float:
        """The exponent of one variable."""
        return float(self.exponents[self.variables.index(variable)])

    def coefficient(self, variable: str) -> float:
        """The coefficient of a variable that is not divided by its scale, as laws are usually published."""
        number = self.variables.index(variable)
        return float(self.coefficients[number] * self.scales[number] ** self.exponents[number])


@dataclass(frozen=True)
class Fit:
    """A law, the same law on runs drawn anew (bootstrap), and its error on runs that were left out."""

    law: PowerLaw
    drawn: tuple[PowerLaw, ...]
    held_out_error: float
    """Mean relative error of the predicted loss, each run predicted from all others."""

    def interval(self, variable: str) -> tuple[float, float]:
        """The 95% interval of the exponent of a variable."""
        low, high = np.quantile([law.exponent(variable) for law in self.drawn], TAILS)
        return float(low), float(high)


def fit(variables: Sequence[str], points_PV: np.ndarray, losses_P: np.ndarray, seed: int = 0) -> Fit:
    """Fit a power law to runs.

    Args:
        variables: names of the columns of ``points_PV``, for example parameters, tokens and loop steps.
        points_PV: (runs, variables), positive.
        losses_P: the final validation loss of each run.

    Raises:
        UserError: there are too few runs for this law, or a variable has the same value in all of them.
    """
    _check(variables, points_PV, losses_P)
    law = _fit(variables, points_PV, losses_P)
    random, count = np.random.default_rng(seed), len(losses_P)
    drawn: list[PowerLaw] = []
    while len(drawn) < BOOTSTRAPS:
        rows = random.integers(count, size=count)
        if all(len(set(column)) > 1 for column in points_PV[rows].T):
            drawn.append(_fit(variables, points_PV[rows], losses_P[rows], start=law))
    errors = []
    for left_out in range(count):
        others = np.arange(count) != left_out
        predicted = _fit(variables, points_PV[others], losses_P[others], start=law).loss(points_PV[[left_out]])[0]
        errors.append(abs(predicted / losses_P[left_out] - 1))
    return Fit(law, tuple(drawn), float(np.mean(errors)))


def optimum(law: PowerLaw, flops: float, flops_of: np.ndarray) -> np.ndarray:
    """The point with the lowest loss among candidates whose training FLOPs are at most ``flops``.

    Args:
        flops_of: candidates as (candidates, variables + 1), the training FLOPs in the last column.
    """
    allowed = flops_of[flops_of[:, -1] <= flops]
    if not len(allowed):
        raise UserError(f"no candidate has at most {flops:.3g} training FLOPs: give smaller models")
    return allowed[np.argmin(law.loss(allowed[:, :-1]))]


def _check(variables: Sequence[str], points_PV: np.ndarray, losses_P: np.ndarray) -> None:
    needed = 2 + 2 * len(variables)
    if len(losses_P) < needed:
        raise UserError(
            f"{len(losses_P)} runs: a law over {', '.join(variables)} has {needed - 1} constants: give at least "
            f"{needed} runs"
        )
    for name, column in zip(variables, points_PV.T, strict=True):
        if len(set(column)) < 3:
            raise UserError(f"{name}: {len(set(column))} different values in these runs: its exponent needs 3 or more")


def _fit(
    variables: Sequence[str], points_PV: np.ndarray, losses_P: np.ndarray, start: PowerLaw | None = None
) -> PowerLaw:
    scales_V = np.exp(np.log(points_PV).mean(axis=0)) if start is None else start.scales
    logs_PV, count = np.log(points_PV / scales_V), len(variables)

    def residuals(constants: np.ndarray) -> np.ndarray:
        terms_PV = constants[1 : 1 + count] - np.exp(constants[1 + count :]) * logs_PV
        predicted_P = np.logaddexp(constants[0], np.logaddexp.reduce(terms_PV, axis=1))
        return predicted_P - np.log(losses_P)

    starts = _starts(losses_P, count) if start is None else [_constants(start)]
    largest = [np.inf] * (1 + count) + [np.log(LARGEST_EXPONENT)] * count
    options = {"loss": "huber", "f_scale": HUBER_DELTA, "x_scale": "jac", "bounds": (-np.inf, largest)}
    results = [least_squares(residuals, constants, **options) for constants in starts]
    best = min(results, key=lambda result: result.cost).x
    values = np.exp(best)
    return PowerLaw(tuple(variables), float(values[0]), values[1 : 1 + count], values[1 + count :], scales_V)


def _starts(losses_P: np.ndarray, count: int) -> list[np.ndarray]:
    lowest, typical = losses_P.min(), np.median(losses_P)
    return [
        np.log([floor * lowest, *[(typical - floor * lowest) / count] * count, *[exponent] * count])
        for floor, exponent in itertools.product(FLOORS, EXPONENTS)
    ]


def _constants(law: PowerLaw) -> np.ndarray:
    return np.log([law.floor, *law.coefficients, *law.exponents])
