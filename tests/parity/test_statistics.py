"""The intervals on made data whose true answers are known."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import ttest_ind

from mythos.errors import UserError
from mythos.parity.statistics import Interval, combination, difference, gap_share, mean

DRAWS, SEEDS, DOCUMENTS = 100, 3, 60
SITUATIONS = {
    "seeds and documents alike": (0.01, 0.08),
    "seeds matter most": (0.02, 0.02),
    "documents matter most": (0.001, 0.2),
}
"""Deviations of the training seeds' and of the documents' effect on an arm."""


def made(random: np.random.Generator, losses: list[float], situation: str) -> list[np.ndarray]:
    """Losses of arms with these true means on the same documents, which are far more different than the arms."""
    of_seeds, of_documents = SITUATIONS[situation]
    documents_N = random.normal(3, 0.5, DOCUMENTS)
    return [
        loss
        + random.normal(0, of_seeds, (SEEDS, 1))
        + documents_N
        + random.normal(0, of_documents, DOCUMENTS)
        + random.normal(0, 0.05, (SEEDS, DOCUMENTS))
        for loss in losses
    ]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_equal_models_are_seldom_distinguished(situation: str) -> None:
    random = np.random.default_rng(1)
    verdicts = [difference(*made(random, [0.0, 0.0], situation), seed=n).verdict(SEEDS) for n in range(DRAWS)]
    assert verdicts.count("not distinguished") >= DRAWS - 5


@pytest.mark.parametrize("documents", [1, DOCUMENTS], ids=["one value a run", "documents of its own"])
def test_equal_models_without_pairs_are_distinguished_in_5_of_100(documents: int) -> None:
    random, draws = np.random.default_rng(6), 4 * DRAWS
    claims = 0
    for number in range(draws):
        arms = [
            random.normal(0, 0.02, (SEEDS, 1)) + random.normal(3, 0.1, documents) * (documents > 1) for _ in range(2)
        ]
        claims += difference(*arms, seed=number, paired=documents == 1).verdict(SEEDS) != "not distinguished"
    assert claims <= 0.05 * draws + 2 * np.sqrt(0.05 * 0.95 * draws)


def test_arms_whose_seeds_vary_unequally_are_claimed_to_differ_in_5_of_100() -> None:
    """One arm's seeds vary a hundred times as much as the others'; the truth is at the edge of the criterion."""
    random, draws, deviations = np.random.default_rng(7), 4 * DRAWS, (0.001, 0.1, 0.001)
    claims = {"difference": 0, "criterion": 0}
    for number in range(draws):
        documents_N = random.normal(3, 0.5, DOCUMENTS)
        small, looped, large = (random.normal(0, each, (SEEDS, 1)) + documents_N for each in deviations)
        combined = combination([small, looped, large], (-0.25, 1.0, -0.75), seed=number)
        for name, found in (("difference", difference(looped, large, seed=number)), ("criterion", combined)):
            claims[name] += found.verdict(SEEDS) != "not distinguished"
    assert max(claims.values()) <= 0.05 * draws + 2 * np.sqrt(0.05 * 0.95 * draws)


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_with_one_value_a_run_the_interval_is_that_of_welch(spread: float) -> None:
    random = np.random.default_rng(8)
    one, other = random.normal(0, 1, (4, 1)), random.normal(1, spread, (6, 1))
    expected = ttest_ind(one[:, 0], other[:, 0], equal_var=False).confidence_interval(0.95)
    found = difference(one, other)
    assert found.low == pytest.approx(expected.low, abs=0.05 * (expected.high - expected.low))
    assert found.high == pytest.approx(expected.high, abs=0.05 * (expected.high - expected.low))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_gap_of_two_standard_errors_is_found(situation: str) -> None:
    """Of the standard error that two losses with theirs suggest, sqrt(a^2 + b^2): it is not paired over documents."""
    random = np.random.default_rng(2)
    found = 0
    for number in range(DRAWS):
        one, other = made(random, [0.0, 0.0], situation)
        errors = [arm.mean(axis=0).std(ddof=1) / np.sqrt(DOCUMENTS) for arm in (one, other)]
        found += difference(one, other - 2 * np.hypot(*errors), seed=number).verdict(SEEDS) == "higher"
    assert found >= 80


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_interval_of_the_gap_share_covers(situation: str) -> None:
    random, shares = np.random.default_rng(3), (0.0, 0.5, 1.0)
    covered = 0
    for number in range(DRAWS):
        for share in shares:
            interval = gap_share(*made(random, [0.1, 0.1 - 0.1 * share, 0.0], situation), seed=number)
            covered += interval.low <= share <= interval.high
    assert 0.90 <= covered / (DRAWS * len(shares)) <= 0.98


def test_the_interval_of_one_arm_is_that_of_a_t_test() -> None:
    """With one document, the seeds are the only source of variance."""
    losses = np.array([[1.0], [1.2], [1.1], [1.5]])
    interval = mean(losses)
    half = 3.182 * losses.std(ddof=1) / 2  # t(0.975; 3)
    assert interval.estimate == pytest.approx(1.2)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_the_interval_over_documents_is_the_normal_one() -> None:
    losses = np.random.default_rng(4).normal(2.0, 1.0, (1, 400))
    interval = mean(losses)
    half = NormalDist().inv_cdf(0.975) * losses.std(ddof=1) / 20
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_one_seed_is_no_verdict() -> None:
    one, other = np.zeros((1, 50)), np.ones((1, 50))
    assert difference(one, other).verdict(seeds=1) == "one seed"
    assert Interval(0.5, 0.2, 0.8).verdict(seeds=2, reference=1.0) == "lower"


def test_without_a_gap_there_is_no_share() -> None:
    random = np.random.default_rng(5)
    interval = gap_share(*made(random, [0.0, 0.0, 0.0], "seeds and documents alike"))
    assert (interval.low, interval.high) == (-np.inf, np.inf)


def test_other_documents_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[4, 5\] documents: evaluate all of them on the same ones"):
        difference(np.zeros((2, 4)), np.zeros((2, 5)))
