"""Laws of the loss over parameters, tokens and loop steps, fitted to runs.

    L = E + A N^-a + B D^-b,      N = N_once + R^phi N_loop,      D: tokens, R: mean loop steps in training

N_once counts parameters that a token uses once, N_loop those of the loop. The laws differ in phi, what one more pass
through the loop is worth in parameters:

    chinchilla   phi = 0: the loop's parameters count once        (Hoffmann et al. 2022, arXiv 2203.15556)
    parcae       phi = 1: the parameters of the unrolled model    (Prairie et al. 2026, arXiv 2604.12946)
    recurrence   phi is fitted                                    (Schwethelm et al. 2026, arXiv 2604.21106)

E, A, B, a and b are positive, so their logarithms are fitted; N and D are divided by their geometric means, which makes
coefficients and exponents nearly independent. The residual is that of log L, with Huber's loss (delta 1e-3), as in all
three papers, so a diverged run has little influence. The best result of several starts is taken.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from scipy.optimize import least_squares

from mythos.errors import UserError
from mythos.parity.statistics import TAILS

Form = Literal["chinchilla", "parcae", "recurrence"]
FORMS: tuple[Form, ...] = get_args(Form)
PHI = {"chinchilla": 0.0, "parcae": 1.0}
CONSTANTS = {"chinchilla": 5, "parcae": 5, "recurrence": 6}
HUBER_DELTA = 1e-3
BOOTSTRAPS = 200
TRIES = 50
"""Draws for each fit of the bootstrap, because not every draw determines the law."""
EXPONENTS = (0.15, 0.35, 0.7)
"""Of the starts; for each, the loss above E is divided evenly among the terms."""
FLOORS = (0.3, 0.6, 0.9)
"""Of the starts: E relative to the lowest loss."""
PHIS = (0.3, 1.0)
"""Of the starts."""
LARGEST_EXPONENT, LARGEST_PHI = 5.0, 3.0
HELD_OUT = 0.2
"""Share of the runs, those with the most training FLOPs, that are predicted from the others."""
DIFFERENT, COLLINEAR = 3, 0.999
"""Values that a variable needs, and the largest correlation of the logarithms of N and D."""


@dataclass(frozen=True)
class Runs:
    """What a law is fitted to, each (runs,)."""

    once: np.ndarray
    looped: np.ndarray
    """Parameters of the loop; 0 of a dense model."""
    loop_steps: np.ndarray
    """Mean in training; 1 of a dense model."""
    tokens: np.ndarray
    flops: np.ndarray
    """Of the training."""
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.losses)

    def rows(self, chosen: np.ndarray) -> "Runs":
        """Some of the runs."""
        return Runs(**{name: values[chosen] for name, values in vars(self).items()})

    def size(self, phi: float) -> np.ndarray:
        """N of each run."""
        return effective_size(self.once, self.looped, self.loop_steps, phi)


@dataclass(frozen=True)
class Law:
    """The constants of a law."""

    form: Form
    E: float
    A: float
    a: float
    B: float
    b: float
    phi: float

    def loss(self, size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The loss of models of size N after so many tokens."""
        return np.asarray(self.E + self.A * size**-self.a + self.B * tokens**-self.b)

    def predict(self, runs: Runs) -> np.ndarray:
        """The loss of each run."""
        return self.loss(runs.size(self.phi), runs.tokens)


@dataclass(frozen=True)
class HeldOut:
    """The largest runs, predicted by a law that was fitted to the others."""

    rows: np.ndarray
    predicted: np.ndarray
    errors: np.ndarray
    """Relative."""


@dataclass(frozen=True)
class Fit:
    """A law, the same law on runs drawn anew (bootstrap), and its error on the largest runs; None: too few others."""

    law: Law
    drawn: tuple[Law, ...] = field(repr=False)
    held_out: HeldOut | None
    error: float
    """Mean relative error on the runs that it was fitted to."""

    def interval(self, value: Callable[[Law], float]) -> tuple[float, float]:
        """The 95% interval of what follows from a law, such as one of its constants."""
        low, high = np.quantile([value(law) for law in self.drawn], TAILS)
        return float(low), float(high)


def effective_size(once: np.ndarray, looped: np.ndarray, loop_steps: np.ndarray, phi: float) -> np.ndarray:
    """N = N_once + R^phi N_loop."""
    return np.asarray(once + loop_steps**phi * looped)


def fit(form: Form, runs: Runs, seed: int = 0) -> Fit:
    """Fit a law to runs.

    Raises:
        UserError: the runs do not determine its constants.
    """
    check(form, runs)
    law = _fit(form, runs)
    random = np.random.default_rng(seed)
    drawn: list[Law] = []
    for _ in range(TRIES * BOOTSTRAPS):
        again = runs.rows(random.integers(len(runs), size=len(runs)))
        if is_determined(form, again):
            drawn.append(_fit(form, again, law))
        if len(drawn) == BOOTSTRAPS:
            break
    error = np.abs(law.predict(runs) / runs.losses - 1).mean()
    return Fit(law, tuple(drawn) or (law,), _hold_out(form, runs, law), float(error))


def is_determined(form: Form, runs: Runs) -> bool:
    """Whether the runs determine the law's constants."""
    try:
        check(form, runs)
    except UserError:
        return False
    return True


def check(form: Form, runs: Runs) -> None:
    """Raises UserError, which says what is needed, if the runs do not determine the law's constants."""
    needed = CONSTANTS[form] + 1
    if len(runs) < needed:
        raise UserError(
            f"{form}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, its {needed - 1} constants need {needed} or "
            "more: give more finished runs, or one with several budgets"
        )
    size = runs.size(PHI.get(form, 1.0))
    what = "parameters" if form == "chinchilla" else "parameters of the unrolled model"
    for name, values in ((what, size), ("tokens", runs.tokens)):
        if (count := _different(values)) < DIFFERENT:
            raise UserError(f"{form}: {count} different {name}: its exponent needs {DIFFERENT} or more")
    if abs(np.corrcoef(np.log(size), np.log(runs.tokens))[0, 1]) > COLLINEAR:
        raise UserError(
            f"{form}: {what} and tokens grow together in these runs, so their exponents cannot be told apart: train a "
            "model with several budgets"
        )
    if form == "recurrence" and _different(runs.loop_steps[runs.looped > 0]) < 2:
        raise UserError("recurrence: looped runs with one mean depth or none: phi needs 2 or more mean depths")


def _different(values: np.ndarray) -> int:
    """How many values differ by more than 1%."""
    ordered = np.sort(values)
    return int(len(ordered) > 0) + int((np.diff(np.log(ordered)) > 0.01).sum())


def _hold_out(form: Form, runs: Runs, start: Law) -> HeldOut | None:
    count = max(1, round(HELD_OUT * len(runs)))
    limit = np.sort(runs.flops)[-count]
    others = runs.flops < limit * (1 - 1e-6)  # runs with the same budget are held out together
    if not is_determined(form, runs.rows(others)):
        return None
    held = runs.rows(~others)
    predicted = _fit(form, runs.rows(others), start).predict(held)
    return HeldOut(np.flatnonzero(~others), predicted, predicted / held.losses - 1)


def _fit(form: Form, runs: Runs, start: Law | None = None) -> Law:
    scale = float(np.exp(np.log(runs.size(PHI.get(form, 1.0))).mean()))
    of_tokens = float(np.exp(np.log(runs.tokens).mean()))
    logs_D = np.log(runs.tokens / of_tokens)
    fixed = PHI.get(form)

    def residuals(constants: np.ndarray) -> np.ndarray:
        phi = constants[5] if fixed is None else fixed
        of_size = constants[1] - np.exp(constants[2]) * np.log(runs.size(phi) / scale)
        terms = np.stack([np.full(len(runs), constants[0]), of_size, constants[3] - np.exp(constants[4]) * logs_D])
        return np.asarray(np.logaddexp.reduce(terms, axis=0) - np.log(runs.losses))

    starts = _starts(runs.losses, fixed is None) if start is None else [_constants(start, scale, of_tokens)]
    largest = [np.inf, np.inf, np.log(LARGEST_EXPONENT), np.inf, np.log(LARGEST_EXPONENT), LARGEST_PHI]
    lowest = [-np.inf] * 5 + [-LARGEST_PHI]
    count = CONSTANTS[form]
    options = {"loss": "huber", "f_scale": HUBER_DELTA, "x_scale": "jac", "bounds": (lowest[:count], largest[:count])}
    results = [least_squares(residuals, constants[:count], **options) for constants in starts]
    best = min(results, key=lambda result: result.cost).x
    log_E, log_A, log_a, log_B, log_b = best[:5]
    a, b = np.exp(log_a), np.exp(log_b)
    phi = best[5] if fixed is None else fixed
    coefficients = np.exp(log_A) * scale**a, np.exp(log_B) * of_tokens**b
    return Law(
        form, float(np.exp(log_E)), float(coefficients[0]), float(a), float(coefficients[1]), float(b), float(phi)
    )


def _starts(losses: np.ndarray, with_phi: bool) -> list[np.ndarray]:
    lowest, typical = losses.min(), np.median(losses)
    return [
        np.array([np.log(floor * lowest), *[np.log((typical - floor * lowest) / 2), np.log(exponent)] * 2, phi])
        for floor, exponent, phi in itertools.product(FLOORS, EXPONENTS, PHIS if with_phi else PHIS[:1])
    ]


def _constants(law: Law, scale: float, of_tokens: float) -> np.ndarray:
    log_A, log_B = np.log(law.A) - law.a * np.log(scale), np.log(law.B) - law.b * np.log(of_tokens)
    return np.array([np.log(law.E), log_A, np.log(law.a), log_B, np.log(law.b), law.phi])


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The coefficient and the exponent of y = coefficient x^exponent, by least squares of the logarithms."""
    exponent, log_coefficient = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_coefficient)), float(exponent)
