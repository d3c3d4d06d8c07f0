"""What can be said about the arms of an experiment: paired bootstrap over documents and training seeds.

Every arm (model, recipe, budget) was trained with several seeds and evaluated on the same documents. The loss of arm a,
seed s on document d is taken as

    x[a, s, d] = m[a] + u[a, s] + v[d] + w[a, d] + noise

where u is what another training seed changes, v how hard a document is, and w which documents suit an arm. All arms
share v, so it cancels in their differences: documents are drawn anew together for all arms (paired), seeds for each arm
by itself. Few seeds cannot be drawn anew from each other: n values vary around their own mean by sqrt((n - 1) / n) too
little, and their variance is itself uncertain. Therefore the mean over the seeds of arm a is drawn from a normal
distribution with the variance s[a]^2 / n[a] of the arm's own seeds, which may be far larger than another arm's. For the
interval of a combination, the sum of c[a] m[a], all deviations are then multiplied by

    t(0.975; f) / t(0.975; infinity),      f = (sum of e)^2 / (sum of e^2 / f[e])

with Student's t and the degrees of freedom of Welch and Satterthwaite: of each arm e = c[a]^2 s[a]^2 / n[a] with
f = n[a] - 1, of the documents e = the variance of the combination over their draws with f = their number - 1. Where
seeds are the only source of variance, the 95% interval is that of Welch's t-test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t

from mythos.errors import UserError

DRAWS = 2000
TAILS = (0.025, 0.975)

Verdict = Literal["lower", "higher", "not distinguished", "one seed"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval; infinite where the data give no bound."""

    estimate: float
    low: float
    high: float

    def verdict(self, seeds: int, reference: float = 0.0) -> Verdict:
        """How the estimate compares with a reference; ``seeds`` is the smallest number of seeds of an arm in it."""
        if seeds < 2:
            return "one seed"
        if self.high < reference:
            return "lower"
        return "higher" if self.low > reference else "not distinguished"


def mean(arm_SN: np.ndarray, seed: int = 0) -> Interval:
    """The mean over seeds and documents of one arm, (seeds, documents)."""
    return combination([arm_SN], (1.0,), seed)


def difference(arm_SN: np.ndarray, other_SN: np.ndarray, seed: int = 0, paired: bool = True) -> Interval:
    """mean(arm) - mean(other), paired over documents; ``paired=False``: each has documents of its own."""
    return combination([arm_SN, other_SN], (1.0, -1.0), seed, paired)


def combination(arms: Sequence[np.ndarray], factors: Sequence[float], seed: int = 0, paired: bool = True) -> Interval:
    """The sum of the arms' means times these factors."""
    values_B = np.asarray(factors) @ bootstrap(arms, factors, seed, paired)
    return Interval(float(values_B[0]), *_tails(values_B[1:]))


def gap_share(small_SN: np.ndarray, looped_SN: np.ndarray, large_SN: np.ndarray, seed: int = 0) -> Interval:
    """The share (small - looped) / (small - large) of the gap between two standard models that the looped one closes.

    1: as good as the large one. The interval is unbounded where the two standard models are not distinguished, because
    then there is no gap to close a share of.
    """
    arms = [small_SN, looped_SN, large_SN]
    small, looped, large = (float(arm_SN.mean()) for arm_SN in arms)
    share = (small - looped) / (small - large) if small != large else np.nan
    gap = difference(small_SN, large_SN, seed)
    if gap.low <= 0 <= gap.high:
        return Interval(share, -np.inf, np.inf)
    # Near the estimate the share varies as this combination does, divided by the gap.
    small_B, looped_B, large_B = bootstrap(arms, (1 - share, -1.0, share), seed)
    return Interval(share, *_tails(((small_B - looped_B) / (small_B - large_B))[1:]))


def bootstrap(arms: Sequence[np.ndarray], factors: Sequence[float], seed: int = 0, paired: bool = True) -> np.ndarray:
    """The means of all arms, (arms, 1 + DRAWS): first as measured, then in each draw.

    Args:
        arms: for each arm its values, (seeds, documents), with the same documents in the same order. With one seed,
            its seeds' variance is taken as the mean of the other arms'; if all have one, nothing is known about it.
        factors: of the combination of the means whose interval the draws are for.
        seed: of the draws.
        paired: otherwise each arm has documents of its own, which are drawn by themselves.

    Raises:
        UserError: the arms were not evaluated on the same documents, or on none.
    """
    documents = {arm_SN.shape[1] for arm_SN in arms}
    if (paired and len(documents) != 1) or 0 in documents:
        raise UserError(f"the arms have {sorted(documents)} documents: evaluate all of them on the same ones")
    random = np.random.default_rng(seed)
    by_seed = [arm_SN.mean(axis=1) for arm_SN in arms]
    means_A1 = np.array([[seeds_S.mean()] for seeds_S in by_seed])
    deviations = [arm_SN.mean(axis=0, keepdims=True) - arm_SN.mean() for arm_SN in arms]
    together = [np.concatenate(deviations)] if paired else deviations
    of_documents_AB = np.concatenate([_draw_documents(each_AN, random) for each_AN in together])
    variances_A, freedoms_A = _of_seeds(by_seed)
    of_seeds_AB = random.normal(size=of_documents_AB.shape) * np.sqrt(variances_A)[:, None]
    factors_A = np.asarray(factors)
    errors = np.append(np.square(factors_A) * variances_A, (factors_A @ of_documents_AB).var())
    freedoms = np.append(freedoms_A, max(1, min(documents) - 1))
    draws_AB = means_A1 + _scale(errors, freedoms) * (of_documents_AB + of_seeds_AB)
    return np.concatenate([means_A1, draws_AB], axis=1)


def _draw_documents(deviations_AN: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The mean deviation of each arm on documents that are drawn anew, the same for all arms, (arms, DRAWS)."""
    count = deviations_AN.shape[1]
    if count == 1:
        return np.zeros((len(deviations_AN), DRAWS))
    times_BN = random.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return deviations_AN @ times_BN.T / count * np.sqrt(count / (count - 1))


def _of_seeds(by_seed: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The variance of each arm's mean by its seeds, and the degrees of freedom of that variance."""
    counts_A = np.array([len(seeds_S) for seeds_S in by_seed])
    known_A = counts_A > 1
    if not known_A.any():
        return np.zeros(len(by_seed)), np.ones(len(by_seed))
    variances_A = np.array([seeds_S.var(ddof=1) if len(seeds_S) > 1 else 0.0 for seeds_S in by_seed])
    variances_A[~known_A] = variances_A[known_A].mean()
    return variances_A / counts_A, np.where(known_A, counts_A - 1, (counts_A - 1).sum())


def _scale(errors: np.ndarray, freedoms: np.ndarray) -> float:
    """How much wider than a normal one the interval of a sum with these variances is."""
    if not errors.any():
        return 1.0
    freedom = errors.sum() ** 2 / (errors**2 / freedoms).sum()
    return float(t.ppf(TAILS[1], freedom) / norm.ppf(TAILS[1]))


def _tails(values_B: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_B, TAILS)
    return float(low), float(high)
