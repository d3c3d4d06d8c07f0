from fractions import Fraction

import numpy as np
import pytest

from mythos.data.mixture import Mixture

WEIGHTS = [
    (1.0,),
    (0.7, 0.3),
    (1, 1, 1),
    (0.98, 0.01, 0.01),
    (0.5, 0.49, 0.01),
    (0.5, 0.26, 0.23, 0.01),
    (1, 2, 3, 4, 5, 6, 7),
    (34_567_890_123, 12_345_678_901, 0.001),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_window_holds_each_source_by_its_weight_within_the_bound(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights)
    first, samples = 10**12, 1500
    sources = np.array([mixture.locate(sample)[0] for sample in range(first, first + samples)])
    total = sum(Fraction(str(weight)) for weight in weights)
    for source, weight in enumerate(weights):
        share = float(Fraction(str(weight)) / total)
        # Over all windows: the largest difference of two prefixes' errors.
        error = np.concatenate([[0], np.cumsum(sources == source)]) - share * np.arange(samples + 1)
        worst = max(np.max(error - np.minimum.accumulate(error)), np.max(np.maximum.accumulate(error) - error))
        assert worst <= mixture.bounds[source] + 1e-6
        if len(weights) > 1:
            assert worst > 0.3 or share < 1e-3, "the bound is not much too large"


def test_the_bounds_are_those_of_the_docstring() -> None:
    assert Mixture([3]).bounds == [0]
    assert Mixture([0.7, 0.3]).bounds == [1, 1]
    assert Mixture([1, 1, 1, 1]).bounds == [1.5] * 4
    assert max(Mixture([0.5, 0.49, 0.01]).bounds) == pytest.approx(1.98)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_source_is_read_in_its_own_order_without_gap_or_repeat(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights)
    next_sample = [0] * len(weights)
    for sample in range(2000):
        assert mixture.counts(sample) == next_sample
        source, number = mixture.locate(sample)
        assert number == next_sample[source]
        next_sample[source] += 1


def test_the_mixture_is_exact_after_a_trillion_samples() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    for count, share in zip(mixture.counts(10**12), (0.7, 0.2, 0.1), strict=True):
        assert abs(count - share * 10**12) < 2


@pytest.mark.parametrize("weights", [(), (0.0, 1.0), (-1.0, 2.0)])
def test_invalid_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Mixture(weights)
