"""The distribution from which ``loop`` draws the depth T of a sequence: at least 1 loop step."""

import math

import numpy as np

from mythos.config.loop_schema import Loop

QUADRATURE_POINTS = 64


def mean_depth(config: Loop, step: int) -> float:
    """Mean depth at this update: the curriculum's linear rise from 1, then ``loop.mean_depth``."""
    risen = min(1.0, step / config.curriculum_steps) if config.curriculum_steps else 1.0
    return 1 + (config.mean_depth - 1) * risen


def cumulative_distribution(config: Loop, mean: float) -> np.ndarray:
    """P(T <= 0), P(T <= 1), ... until they are 1 to rounding.

    Fixed: T = mean, rounded. Poisson: T = max(1, Poisson(mean)). Log-normal Poisson (Huginn, arXiv 2502.05171):
    T = 1 + Poisson(exp(tau)), tau normal with mean log(mean - 1) - sigma^2 / 2, so that T has the requested mean.
    """
    if config.depth == "fixed":
        return np.eye(1, round(mean) + 1, round(mean))[0]
    longest = int(mean + 20 * math.sqrt(mean) + 50)
    if config.depth == "log_normal_poisson_per_sequence":
        longest *= math.ceil(math.exp(4 * config.log_normal_sigma))
        nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
        rates = (mean - 1) * np.exp(config.log_normal_sigma * nodes - config.log_normal_sigma**2 / 2)
        mixture = sum(w * _poisson(rate, longest) for w, rate in zip(weights / weights.sum(), rates, strict=True))
        return np.concatenate(([0.0], np.cumsum(mixture)))
    cumulative = np.cumsum(_poisson(mean, longest))
    cumulative[0] = 0.0  # a draw of 0 counts as 1
    return cumulative


def _poisson(rate: float, longest: int) -> np.ndarray:
    """P(N = 0), ..., P(N = longest)."""
    if rate == 0:
        return np.eye(1, longest + 1)[0]
    counts = np.arange(longest + 1)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
    return np.exp(counts * math.log(rate) - rate - log_factorials)
