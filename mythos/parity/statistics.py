"""What can be said about the arms of an experiment: paired bootstrap over documents and training seeds.

Every arm (model, recipe, budget) was trained with several seeds and evaluated on the same documents. The loss of arm a,
seed s on document d is taken as

    x[a, s, d] = m[a] + u[a, s] + v[d] + w[a, d] + noise

where u is what another training seed changes, v how hard a document is, and w which documents suit an arm. All arms
share v, so it cancels in their differences: documents are drawn anew together for all arms (paired), seeds for each arm
by itself. With few seeds a plain bootstrap of seeds is too narrow, because n values vary around their own mean by
sqrt((n - 1) / n) too little and because their variance is itself uncertain. Therefore a seed's deviation is drawn from
those of all compared arms together, whose variance is taken as equal, and is multiplied by

    sqrt(n / (n - 1)) * t(0.975; f) / t(0.975; infinity),      f = sum over the arms of (n - 1)

with Student's t, so that the 95% interval is that of a t-test where seeds are the only source of variance.
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
    return interval_of(bootstrap([arm_SN], seed)[0])


def difference(arm_SN: np.ndarray, other_SN: np.ndarray, seed: int = 0, paired: bool = True) -> Interval:
    """mean(arm) - mean(other), paired over documents; ``paired=False``: each has documents of its own."""
    draws_AB = bootstrap([arm_SN, other_SN], seed, paired)
    return interval_of(draws_AB[0] - draws_AB[1])


def gap_share(small_SN: np.ndarray, looped_SN: np.ndarray, large_SN: np.ndarray, seed: int = 0) -> Interval:
    """The share (small - looped) / (small - large) of the gap between two standard models that the looped one closes.

    1: as good as the large one. The interval is unbounded where the two standard models are not distinguished, because
    then there is no gap to close a share of.
    """
    small_B, looped_B, large_B = bootstrap([small_SN, looped_SN, large_SN], seed)
    closed_B, gap_B = small_B - looped_B, small_B - large_B
    estimate = float(closed_B[0] / gap_B[0]) if gap_B[0] else np.nan
    low, high = _tails(gap_B[1:])
    if low <= 0 <= high:
        return Interval(estimate, -np.inf, np.inf)
    return Interval(estimate, *_tails(closed_B[1:] / gap_B[1:]))


def bootstrap(arms: Sequence[np.ndarray], seed: int = 0, paired: bool = True) -> np.ndarray:
    """The means of all arms, (arms, 1 + DRAWS): first as measured, then in each draw.

    Args:
        arms: for each arm its values, (seeds, documents), with the same documents in the same order. With one seed,
            nothing is known about the seeds' variance unless another arm has more.
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
    draws_AB = means_A1 + of_documents_AB + _draw_seeds(by_seed, random)
    return np.concatenate([means_A1, draws_AB], axis=1)


def _draw_documents(deviations_AN: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The mean deviation of each arm on documents that are drawn anew, the same for all arms, (arms, DRAWS)."""
    count = deviations_AN.shape[1]
    if count == 1:
        return np.zeros((len(deviations_AN), DRAWS))
    times_BN = random.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return deviations_AN @ times_BN.T / count * np.sqrt(count / (count - 1))


def _draw_seeds(by_seed: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """The mean deviation of each arm with training seeds that are drawn anew, (arms, DRAWS)."""
    several = [seeds_S for seeds_S in by_seed if len(seeds_S) > 1]
    if not several:
        return np.zeros((len(by_seed), DRAWS))
    pool = np.concatenate([(s_S - s_S.mean()) * np.sqrt(len(s_S) / (len(s_S) - 1)) for s_S in several])
    freedom = sum(len(seeds_S) - 1 for seeds_S in several)
    pool *= t.ppf(TAILS[1], freedom) / norm.ppf(TAILS[1])
    return np.stack([random.choice(pool, (len(seeds_S), DRAWS)).mean(axis=0) for seeds_S in by_seed])


def interval_of(values_B: np.ndarray) -> Interval:
    """The interval of a quantity that was computed from ``bootstrap``, (1 + DRAWS,)."""
    return Interval(float(values_B[0]), *_tails(values_B[1:]))


def _tails(values_B: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_B, TAILS)
    return float(low), float(high)
